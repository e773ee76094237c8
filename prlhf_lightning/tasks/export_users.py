"""Users' soft prompts in the formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from peft import PromptTuningConfig
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.progress import tracked
from prlhf_lightning.data.tokenization import writes_bos
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.files import write_whole
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.types import Users
from prlhf_lightning.user_models import UserModel

#: The generic user's key, which no user can have: ids are not empty.
GENERIC = ""
_SHARD = 1 << 29  # bytes of a shard at most
_KEYS = 100_000  # users in a shard at most: the header of a safetensors file may have 100 MB
_BATCH = 1024


def user_vectors(user_model: UserModel, rows: Sequence[int]) -> list[Tensor]:
    """Return the vectors `[T, d]` of some rows of the user table, without any text about the users."""
    prompt = user_model(Users(torch.tensor(rows, dtype=torch.long)))
    return [vectors.contiguous() for vectors in prompt.unpadded()]


def write_user_vectors(folder: Path, user_model: UserModel, vocabulary: UserVocabulary, shard: int = _SHARD) -> None:
    """Write every user's vectors `[T, d]` by the user's id, and the generic user's by the empty string.

    One file, `user_vectors.safetensors`, or where they exceed a shard, several and an index, named as transformers
    names the parts of a model. No more than one shard is in memory at a time.

    Args:
        folder: Where the files go.
        user_model: Makes the vectors.
        vocabulary: The users.
        shard: Bytes of a file at most.
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
        write_whole(folder / "user_vectors.safetensors.index.json", json.dumps(index, ensure_ascii=False).encode())


def write_token_embeddings(folder: Path, policy: CausalLMPolicy) -> None:
    """Write the vectors `[V, d]` that the model makes of its tokens, as `token_embeddings.safetensors`."""
    table = policy.lm.get_input_embeddings()
    # Through the module and not from its weight: some models (Gemma) scale what they look up.
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

    PEFT puts a prompt's vectors before all tokens, and the policy was trained with them after BOS. So BOS becomes the
    first of the vectors where the tokenizer writes one, and prompts are then tokenised without it.

    Args:
        folder: Where the files go.
        policy: Its policy.
        user_model: Makes the vectors.
        vocabulary: The users.
        only: Those wanted of the users; all if none are given. The generic user is always there.
        base: The folder of the merged model, as others are to find it; `folder` if not given.
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
    """Return the name of a user's folder: the id with what has a meaning in paths percent-encoded; `_` is generic."""
    if user_id == GENERIC:
        return "_"
    name = quote(user_id, safe="").replace(".", "%2E") if set(user_id) == {"."} else quote(user_id, safe="")
    name = "%5F" if name == "_" else name
    if len(name) > 255:
        raise ConfigurationError(f"peft_users: {user_id!r} is too long for the name of a folder; name others.")
    return name


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_whole(path, safetensors_bytes({name: tensor.detach() for name, tensor in tensors.items()}))
