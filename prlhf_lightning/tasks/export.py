"""A trained model as a Hugging Face folder: the language model, its users' vectors, and what writing for them needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from safetensors.torch import save as safetensors_bytes
from transformers import PreTrainedModel

from prlhf_lightning.checkpoint_files import checkpoint_of
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.export_checksums import SETTINGS
from prlhf_lightning.files import check_output_folder, write_whole
from prlhf_lightning.finite_numbers import named_not_finite
from prlhf_lightning.folders import UNFINISHED, not_left_empty, whole_folder
from prlhf_lightning.inference.folder import USERS, WEIGHTS, settings_json
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.policies.generation_settings import end_tokens_only, warn_of_not_applied
from prlhf_lightning.policies.loading import unused_ids
from prlhf_lightning.tasks.checkpoints import read_checkpoint
from prlhf_lightning.tasks.export_users import write_peft_users, write_token_embeddings, write_user_vectors
from prlhf_lightning.tasks.known_users import require_known
from prlhf_lightning.tasks.model_card import is_card, model_card
from prlhf_lightning.tasks.models import module_of

# What an export may leave that the next one does not replace.
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

    transformers reads the language model and tokenizer; `generate` and `PersonalizedWriter.from_folder` all of it. See
    docs/export.md.

    Args:
        model: A checkpoint of a model that the command line trained, or the folder of its run.
        output: The folder to write; made if it is not there.
        adapters: Write the LoRA adapters, which refer to the base model, and not the whole model with them merged in.
        include_users: Write the users. Without them the folder is an ordinary language model, which has learned
            nobody's id.
        user_vectors: Write each user's soft prompt, for programs that know nothing of user models.
        prompt_embeds: Also write the model's token embeddings, of which, with the vectors, vLLM's `prompt_embeds` are
            made without loading the model.
        peft_users: Also write a PEFT prompt-tuning folder for each user.
        user: Ids of the users who get a PEFT folder, as in `--user ann bob`; all if none is given.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; what a file names beside is refused.
    """
    _check_output(output)
    checkpoint = checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    module = module_of(content, checkpoint, "model", trust_remote_code, trust_classes)
    policy = module.policy
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
        raise ConfigurationError("user: it names who gets a PEFT folder; add `--peft_users true`.")
    require_known(only, module.vocabulary, "user")
    card = model_card(checkpoint, content, adapters, include_users, user_vectors).encode()
    with whole_folder(output, _LEFT, last=SETTINGS) as folder:
        _write_lm(policy, folder, adapters)
        write_whole(folder / "README.md", card)  # after PEFT, which writes a card of its own
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
    if others and not is_card(folder / "README.md"):  # what someone else keeps there is not to be lost
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
        # Answers end where they end in training, and are drawn as here, in whatever program reads the folder.
        lm.generation_config = end_tokens_only(
            policy.tokenizer, policy.end_token_ids, unused_ids(policy.tokenizer, policy.lm)
        )
        _check_merged(lm)
        lm.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _check_merged(lm: PreTrainedModel) -> None:
    """Refuse weights with which nothing can be written: adapters may be too large for float16 once they are added."""
    if wrong := named_not_finite(dict(lm.named_parameters())):
        raise NonFiniteError(
            f"model: with its adapters merged in it would hold numbers that are infinite or NaN: {wrong}. Export with "
            "`--adapters true`, or train with model.policy.dtype bfloat16 or float32."
        )


def _write_personal_part(folder: Path, user_model: Any, module: PersonalizedLM, policy: CausalLMPolicy) -> None:
    weights = {name: weight.detach().clone().contiguous() for name, weight in module.user_model.state_dict().items()}
    write_whole(folder / WEIGHTS, safetensors_bytes(weights))
    ids = list(module.vocabulary.ids) if module.vocabulary else []
    write_whole(folder / USERS, json.dumps({"format": 1, "users": ids}, ensure_ascii=False).encode() + b"\n")
    settings = settings_json(
        folder,
        policy.name.rpartition("/")[2].removeprefix("builtin:"),
        user_model,
        module.tokenization,
        base=policy.name,
        base_dtype=str(policy.lm.dtype).removeprefix("torch."),
        base_identity=policy.base_identity(),
    )
    write_whole(folder / SETTINGS, settings.encode())
