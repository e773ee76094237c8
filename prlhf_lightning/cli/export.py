"""The command `export`: a Hugging Face folder with the language model and its users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel, PromptTuningConfig
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from transformers import PreTrainedModel

from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.export_rewards import export_reward_model
from prlhf_lightning.cli.model_card import is_card, model_card
from prlhf_lightning.cli.models import module_of
from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.tokenization import writes_bos
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.inference.folder import USERS, WEIGHTS, settings_json
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.policies.generation_settings import end_tokens_only, warn_of_not_applied
from prlhf_lightning.policies.loading import unused_ids
from prlhf_lightning.training.checkpoint_entry import is_reward_model
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.training.user_rows import check_known_users
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.utils.finite import named_not_finite
from prlhf_lightning.utils.hashing import SETTINGS
from prlhf_lightning.utils.io import UNFINISHED, atomic_write_bytes, check_output_folder, not_left_empty, whole_folder
from prlhf_lightning.utils.progress import tracked

# Files that an export may leave and the next one does not replace.
_LEFT = ["*config.json", "*model*.safetensors*", "*chat_template*", "token_embeddings.safetensors"]
_LEFT += [USERS, SETTINGS, "user_vectors*", "peft_users"]


def export(
    model: Path,
    output: Path,
    adapters: bool = False,
    include_users: bool = True,
    user_vectors: bool = True,
    prompt_embeds: bool = False,
    peft_users: bool = False,
    user: str | list[str] | None = None,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face model folder, with its users.

    transformers reads the language model and tokenizer; `generate` and `Generator.from_folder` all of it. See
    docs/export.md. Of a reward model, the folder holds heads and users, which torch reads (docs/reward_models.md).

    Args:
        model: A checkpoint of a model that the command line trained, or the folder of its run.
        output: The folder to write; created if missing.
        adapters: Write the LoRA adapters, which refer to the base model, in place of the merged model.
        include_users: Write the users. Without them the folder is an ordinary language model without user ids.
        user_vectors: Write each user's soft prompt, for programs without user models.
        prompt_embeds: Also write the model's token embeddings. With the vectors, they give vLLM's `prompt_embeds`
            without loading the model.
        peft_users: Also write a PEFT prompt-tuning folder for each user.
        user: Ids of the users who get a PEFT folder, as in `--user ann bob`; all by default.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    _check_output(output)
    checkpoint = checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    if content and is_reward_model(content):
        if adapters or prompt_embeds or peft_users or user:
            raise ConfigurationError(
                "adapters, prompt_embeds, peft_users, user: a reward model has no soft prompts; leave them out."
            )
        export_reward_model(content, checkpoint, output, include_users, trust_classes)
        return
    module = module_of(content, checkpoint, "model", trust_remote_code, trust_classes)
    policy = module.policy
    if not policy.writes:
        raise ConfigurationError(
            f"model: {checkpoint} is a reward model ({type(policy).__name__}), and exported folders are models that "
            "write; use the checkpoint itself (`score`, `load_scorer`)."
        )
    if not isinstance(policy, CausalLMPolicy) or module.vocabulary is None:
        raise ConfigurationError(
            f"model: its policy is a {type(policy).__name__}; only CausalLMPolicy has the format that this writes."
        )
    if adapters:
        _check_adapters(policy, peft_users)
    else:
        policy.check_can_merge()
    if not include_users and (prompt_embeds or peft_users):
        raise ConfigurationError(
            "include_users: prompt_embeds and peft_users are about users; leave out `--include_users false`."
        )
    only = [user] if isinstance(user, str) else user or []
    if only and not peft_users:
        raise ConfigurationError("user: it selects users for PEFT folders; add `--peft_users true`.")
    check_known_users(only, module.vocabulary, "user")
    card = model_card(checkpoint, content, adapters, include_users, user_vectors).encode()
    with whole_folder(output, _LEFT, last=SETTINGS) as folder:
        _write_lm(policy, folder, adapters)
        atomic_write_bytes(folder / "README.md", card)  # after PEFT, which writes its own card
        if include_users:
            with torch.no_grad():
                if user_vectors:
                    write_user_vectors(folder, module.user_model, module.vocabulary)
                if prompt_embeds:
                    write_token_embeddings(folder, policy)
                if peft_users:
                    write_peft_users(folder, policy, module.user_model, module.vocabulary, only, base=output)
            _write_personal_part(folder, content["hyper_parameters"]["user_model"], module, policy)
    rank_zero_info(f"The model is in {output}")


def _check_output(folder: Path) -> None:
    with not_left_empty(folder):
        is_new = not folder.exists()
        check_output_folder(folder, "output")
        if is_new:
            folder.rmdir()
            return
    others = [path for path in folder.iterdir() if path.name not in UNFINISHED]
    if others and not is_card(folder / "README.md"):  # do not overwrite files of others
        raise ConfigurationError(f"output: {folder} has files in it that `export` did not write; give a new folder.")


def _check_adapters(policy: CausalLMPolicy, peft_users: bool) -> None:
    if not isinstance(policy.model, PeftModel):
        raise ConfigurationError("adapters: this model was trained in full and has none; leave out `--adapters true`.")
    if policy.random_init is not None:
        raise ConfigurationError(
            "adapters: the base model is policy.random_init, whose weights are in no folder to refer to; leave out "
            "`--adapters true`."
        )
    if peft_users:
        raise ConfigurationError(
            "peft_users: PEFT puts a user's vectors before a model and not before another adapter; leave out "
            "`--adapters true`, so that the adapters are merged."
        )


def _write_lm(policy: CausalLMPolicy, folder: Path, adapters: bool) -> None:
    if adapters:
        policy.model.peft_config["default"].base_model_name_or_path = policy.path
        policy.model.peft_config["default"].revision = policy.revision
        policy.model.save_pretrained(folder, save_embedding_layers=False)  # which it would look up on the hub
    else:
        lm = policy.merged()
        warn_of_not_applied(policy.generation_config, policy.name)
        # With this, answers end and are sampled in other programs as here.
        lm.generation_config = end_tokens_only(
            policy.tokenizer, policy.end_token_ids, unused_ids(policy.tokenizer, policy.lm)
        )
        _check_merged(lm)
        lm.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _check_merged(lm: PreTrainedModel) -> None:
    """Refuse non-finite weights: merged adapters may overflow float16."""
    if wrong := named_not_finite(dict(lm.named_parameters())):
        raise NonFiniteError(
            f"model: with its adapters merged in it would hold numbers that are infinite or NaN: {wrong}. Export with "
            "`--adapters true`, or train with model.policy.dtype bfloat16 or float32."
        )


def _write_personal_part(folder: Path, user_model: Any, module: PersonalizedModel, policy: CausalLMPolicy) -> None:
    weights = {name: weight.detach().clone().contiguous() for name, weight in module.user_model.state_dict().items()}
    atomic_write_bytes(folder / WEIGHTS, safetensors_bytes(weights))
    ids = list(module.vocabulary.ids) if module.vocabulary else []
    atomic_write_bytes(folder / USERS, json.dumps({"format": 1, "users": ids}, ensure_ascii=False).encode() + b"\n")
    settings = settings_json(
        folder,
        policy.name.rpartition("/")[2].removeprefix("builtin:"),
        user_model,
        module.tokenization,
        base=policy.name,
        base_dtype=str(policy.lm.dtype).removeprefix("torch."),
        base_identity=policy.base_identity(),
    )
    atomic_write_bytes(folder / SETTINGS, settings.encode())


#: Key of the generic user; no user has it, since ids are not empty.
GENERIC = ""
_SHARD = 1 << 29  # maximum bytes of a shard
_KEYS = 100_000  # maximum users of a shard: the header of a safetensors file is limited to 100 MB
_BATCH = 1024


def user_vectors(user_model: UserModel, rows: Sequence[int]) -> list[Tensor]:
    """Return the vectors `[T, d]` of the given user rows, without texts about the users."""
    prompt = user_model(Users(torch.tensor(rows, dtype=torch.long)))
    return [vectors.contiguous() for vectors in prompt.unpadded()]


def write_user_vectors(folder: Path, user_model: UserModel, vocabulary: UserVocabulary, shard: int = _SHARD) -> None:
    """Write every user's vectors `[T, d]` under the user's id, and the generic user's under the empty string.

    The result is one file, `user_vectors.safetensors`, or several shards with an index, named as in transformers. At
    most one shard is in memory.

    Args:
        folder: Where the files go.
        user_model: The user model.
        vocabulary: The users.
        shard: Maximum bytes of a file.
    """
    if "__metadata__" in vocabulary:
        raise ConfigurationError("user: safetensors has no room for an id of '__metadata__'; remove that user first.")
    ids = (GENERIC, *vocabulary.ids) if user_model.personalizes else (GENERIC,)
    (generic,) = user_vectors(user_model, [0])
    each = max(1, generic.numel() * generic.element_size())
    size = max(1, min(_KEYS, shard // each))
    starts = range(0, len(ids), size)
    weight_map: dict[str, str] = {}
    for number, start in enumerate(tracked(starts, "User vectors", show=len(starts) > 1), start=1):
        suffix = "" if len(starts) == 1 else f"-{number:05d}-of-{len(starts):05d}"
        path = folder / f"user_vectors{suffix}.safetensors"
        content: dict[str, Tensor] = {}
        stop = min(start + size, len(ids))
        for first in range(start, stop, _BATCH):
            rows = range(first, min(first + _BATCH, stop))
            content |= zip((ids[row] for row in rows), user_vectors(user_model, rows), strict=True)
        _write_tensors(path, content)
        weight_map |= dict.fromkeys(content, path.name)
    if len(starts) > 1:
        index = {"metadata": {"users": len(ids) - 1}, "weight_map": weight_map}
        atomic_write_bytes(
            folder / "user_vectors.safetensors.index.json", json.dumps(index, ensure_ascii=False).encode()
        )


def write_token_embeddings(folder: Path, policy: CausalLMPolicy) -> None:
    """Write the model's token embeddings `[V, d]` as `token_embeddings.safetensors`."""
    table = policy.lm.get_input_embeddings()
    # Computed by the module, not copied from its weight: some models (Gemma) scale embeddings.
    vectors = table(torch.arange(table.weight.shape[0]))
    _write_tensors(folder / "token_embeddings.safetensors", {"token_embeddings": vectors.contiguous()})


def write_peft_users(
    folder: Path,
    policy: CausalLMPolicy,
    user_model: UserModel,
    vocabulary: UserVocabulary,
    only: Sequence[str] = (),
    base: Path | None = None,
) -> None:
    """Write a PEFT prompt-tuning folder for each user, and one for the generic user: `peft_users/<id>`.

    PEFT puts vectors before all tokens, but the policy was trained with them after BOS. So if the tokenizer writes BOS,
    it becomes the first vector, and prompts must be tokenized without it.

    Args:
        folder: Where the files go.
        policy: Its policy.
        user_model: The user model.
        vocabulary: The users.
        only: Ids of the users to write; all by default. The generic user is always written.
        base: Path of the merged model in the PEFT config; `folder` by default.
    """
    tokenizer, config = policy.tokenizer, policy.lm.config.get_text_config()
    embed = policy.lm.get_input_embeddings()
    bos = [tokenizer.bos_token_id] if writes_bos(tokenizer) else []
    before = embed(torch.tensor(bos, dtype=torch.long)).float()
    for user_id in tracked((GENERIC, *(only or vocabulary.ids)), "PEFT folders", show=len(vocabulary) >= 1000):
        (vectors,) = user_vectors(user_model, vocabulary.rows([user_id]).tolist())
        vectors = torch.cat([before, vectors.float()])
        if not len(vectors):
            raise ConfigurationError("peft_users: this user model gives no vectors, of which PEFT needs one or more.")
        target = folder / "peft_users" / peft_name(user_id)
        target.mkdir(parents=True, exist_ok=True)
        PromptTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base or folder),
            inference_mode=True,
            num_virtual_tokens=len(vectors),
            token_dim=vectors.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=config.num_attention_heads,
            num_layers=config.num_hidden_layers,
        ).save_pretrained(target)
        _write_tensors(target / "adapter_model.safetensors", {"prompt_embeddings": vectors.contiguous()})


def peft_name(user_id: str) -> str:
    """Return the name of a user's folder: the id, percent-encoded for paths; `_` is the generic user."""
    if user_id == GENERIC:
        return "_"
    name = quote(user_id, safe="").replace(".", "%2E") if set(user_id) == {"."} else quote(user_id, safe="")
    name = "%5F" if name == "_" else name
    if len(name) > 255:
        raise ConfigurationError(f"peft_users: {user_id!r} is too long for the name of a folder; name others.")
    return name


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    atomic_write_bytes(path, safetensors_bytes({name: tensor.detach() for name, tensor in tensors.items()}))
