"""Checksums: of weights, equal on every device, and of the files of exported folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError

_BLOCK = 1 << 15  # 64-bit words per sum; fits into a core's cache. Part of the digest: do not change it


def content_key(*parts: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
    """Return the 16-byte key of token sequences, for example user text, prompt and completion.

    Each part is hashed with its length, so that moving a token from one part to the next changes the key.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        ids = np.asarray(part, dtype="<i8")
        digest.update(ids.size.to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.digest()


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum of the names, shapes, dtypes and exact bits of parameters, independent of their order.

    Every block of words `w_i` is reduced to `Σ a_i w_i` and `Σ b_i (w_i >> 32)` modulo 2^64 with fixed odd random
    multipliers. Integer sums are equal on every device and in every order of summation. The second sum covers the upper
    halves of the words, whose highest bits (signs) could cancel in the first. A difference is missed with a probability
    of about 2^-32. The checksum does not protect against deliberate collisions.

    Args:
        parameters: Names and tensors, as from `Module.named_parameters()`; on any device, not sharded.
    """
    multipliers = torch.from_numpy(np.random.PCG64(0).random_raw((2, _BLOCK)).view(np.int64)) | 1
    rows = sorted([name, str(t.dtype), list(t.shape), _block_sums(t.detach(), multipliers)] for name, t in parameters)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _block_sums(tensor: Tensor, multipliers: Tensor) -> str:
    raw = tensor.flatten().view(torch.uint8)  # no copy unless the tensor is strided
    starts = range(0, raw.numel(), 8 * _BLOCK)
    low, high = multipliers.to(raw.device)
    words, product = torch.zeros(2, _BLOCK, dtype=torch.int64, device=raw.device)
    sums = torch.zeros(2, len(starts), dtype=torch.int64, device=raw.device)
    for block, start in enumerate(starts):
        data = raw[start : start + 8 * _BLOCK]
        if len(data) < 8 * _BLOCK:
            words.zero_()
        words.view(torch.uint8)[: len(data)].copy_(data)  # the tensor may not be word-aligned
        torch.sum(torch.mul(words, low, out=product), dim=0, out=sums[0, block])
        torch.sum(words.bitwise_right_shift_(32).mul_(high), dim=0, out=sums[1, block])
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()


SETTINGS = "prlhf.json"
_KEY = "sha256"
_ADAPTERS = "adapter_config.json"
#: Path of the base model, which users edit after moving the model.
_BASE_PATH = "base_model_name_or_path"
#: Name prefixes of files for people and other programs; this package does not read them, so they are not checked.
_NOT_READ = ("README.md", "user_vectors", "token_embeddings", "peft_users", ".", SETTINGS)
#: Optional files that transformers and PEFT read if they exist.
_READ = (
    "config.json", "generation_config.json", "adapter_config.json", "adapter_model.*", "model*.safetensors*",
    "pytorch_model*", "*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*chat_template*",
)  # fmt: skip


def with_checksums(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `prlhf.json`, with the SHA-256 of each file in the folder and of the content itself."""
    return {**settings, _KEY: {SETTINGS: _of_json(settings, without=_KEY), **_sums(folder, _files(folder))}}


def check_folder(folder: Path) -> None:
    """Check the files of an exported folder before anything is read; see `check_checksums`."""
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except ValueError as error:
        raise _changed(folder / SETTINGS) from error
    if not isinstance(settings, dict):
        raise _changed(folder / SETTINGS)
    check_checksums(folder, settings)


def check_checksums(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the files of a folder are unchanged since the export.

    Args:
        folder: The folder.
        settings: The content of its `prlhf.json`. Format 1 has no checksums; null disables them.

    Raises:
        ConfigurationError: A file was changed, removed or added; the message names it.
    """
    if settings.get("format") == 1 or settings.get(_KEY, "") is None:
        return
    sums = settings.get(_KEY)
    if not isinstance(sums, dict) or sums.get(SETTINGS) != _of_json(settings, without=_KEY):
        raise _changed(folder / SETTINGS)
    exported, present = sums.keys() - {SETTINGS}, set(_files(folder))
    if missing := exported - present:
        raise _changed(folder / min(missing))
    found = _sums(folder, sorted(exported))
    if other := [name for name, digest in found.items() if digest != sums[name]]:
        raise _changed(folder / other[0])
    if added := [name for name in sorted(present - exported) if any(fnmatch(name, pattern) for pattern in _READ)]:
        raise _changed(folder / added[0])


def _changed(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is not as it was exported. If it is damaged, export the folder again; if it was changed on purpose, "
        f'write "{_KEY}": null in place of the checksums in {SETTINGS}.'
    )


def _files(folder: Path) -> list[str]:
    """Return the paths of the checked files, relative to the folder."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not name.startswith(_NOT_READ)]


def _sums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # a model may have many large files
        return dict(zip(names, pool.map(_of_file, (folder / name for name in names)), strict=True))


def _of_file(path: Path) -> str:
    if path.name == _ADAPTERS:
        try:
            return _of_json(json.loads(path.read_bytes()), without=_BASE_PATH)
        except (ValueError, AttributeError):  # not JSON, or not an object
            return ""
    with path.open("rb") as file:
        return file_digest(file, sha256).hexdigest()


def _of_json(content: Mapping[str, Any], without: str) -> str:
    rest = {name: value for name, value in content.items() if name != without}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
