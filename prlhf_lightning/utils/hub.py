"""Checks of model and data set paths before anything is loaded or requested over the network."""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from prlhf_lightning.errors import ConfigurationError

_log = logging.getLogger(__name__)
#: Files of which a folder for `from_pretrained` has at least one.
_FILES = {
    "weights": ["config.json", "adapter_config.json"],
    "config": ["config.json"],
    "tokenizer": ["*token*", "vocab*", "*.model"],
    "data": ["*"],
}
_DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt"}
_LONGEST = 500  # characters of a cause
#: Prefixes of the hub's oldest names, which have no owner.
_WITHOUT_OWNER = ("gpt2", "distil", "openai-gpt", "ctrl", "bert-", "roberta-", "xlnet-", "xlm-")


def find_source_problem(path: str, what: Literal["weights", "config", "tokenizer", "data"]) -> str | None:
    """Return the reason why a path or hub name cannot be loaded, or None; log a message before a request to the hub.

    Args:
        path: A folder, or a hub name.
        what: Kind of files to load.
    """
    folder = Path(path)
    if folder.exists():
        if not folder.is_dir():
            return gguf_problem(folder) if folder.suffix == ".gguf" else "it is a file, not a folder"
        if not any(any(folder.glob(name)) for name in _FILES[what]):
            gguf = sorted(folder.glob("*.gguf"))
            return f"the folder holds no {what} ({' or '.join(_FILES[what])})" + (
                f"; {gguf_problem(gguf[0])}" if gguf else ""
            )
        return None
    if path.startswith((".", "/", "~")) or path.count("/") > 1:  # not a hub name
        return "there is no such folder"
    if what == "data":
        if folder.suffix in _DATA_FILES:
            return "there is no such file"
    elif "/" not in path and not path.startswith(_WITHOUT_OWNER):  # but many old data sets have no owner
        return "there is no such folder, and a name on the hub has an owner, as in `owner/model`"
    if folder.parent.is_dir() and folder.parent != Path():
        warnings.warn(f"There is no folder {path}: looking for it on the hub.", stacklevel=2)
    elif not constants.HF_HUB_OFFLINE:
        _announce(path)
    return None


@contextmanager
def loading(path: str, what: Literal["weights", "config", "tokenizer"], name: str, fix: str) -> Iterator[None]:
    """Turn errors of a block that loads from a path or hub name into errors that name the setting.

    Args:
        path: A folder, or a hub name.
        what: Kind of files to load.
        name: The setting and its value; the message starts with it.
        fix: The fix if it cannot be read.

    Raises:
        ConfigurationError: It cannot be loaded, or the block rejected it.
    """
    failure = f"{name} could not be loaded; {fix} Cause:"
    if (problem := find_source_problem(path, what)) is not None:
        raise ConfigurationError(f"{failure} {problem}")
    try:
        if Path(path).is_dir() and (problem := find_model_problem(Path(path), what)) is not None:
            raise ConfigurationError(problem)
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{name} can't be used: {error}") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # Libraries raise all kinds of errors for malformed files; panics of Rust libraries are not an `Exception`.
    except BaseException as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # the caller handles these
            raise
        raise ConfigurationError(f"{failure} {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return an error's message in one line."""
    first, _, rest = str(error).strip().partition("\n")
    if first.startswith("Weights only load failed"):
        return "a .bin file is damaged, or contains code besides weights; use the model's .safetensors files"
    if "contains custom code" in first:
        return (
            "it comes with its own code; if you trust it, set trust_remote_code (`--trust_remote_code true`), or "
            "for `validate`, `test` and `predict` give the run's configuration, which sets it, with --config"
        )
    if first.endswith(":"):  # the reason is in the next line
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    first = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
    # A single word, such as a missing key, needs the type of the error.
    is_said = " " in first or isinstance(error, OSError | ValueError)
    return first if is_said else f"a file is damaged or of another format ({type(error).__name__}: {first})"


@cache  # once for weights and tokenizer
def _announce(path: str) -> None:
    _log.warning("Asking the hub for %s, which takes a minute to fail if it can't be reached.", path)


_AGAIN = "download it again"
#: In the search order of transformers; the second of each pair lists the shards of large models.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Data types of quantized weights in safetensors, and the settings of config.json that describe them.
_EIGHT_BITS = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
_SCALES = ("quantization_config", "compression_config")
_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TOKENIZER_TEXTS = ("*.model", "merges.txt", "vocab.txt", "*.jinja", "*.tiktoken")


def find_model_problem(folder: Path, what: Literal["weights", "config", "tokenizer"]) -> str | None:
    """Return a message about a missing or malformed file of a model folder, with the fix; None if there is none.

    Args:
        folder: A folder for `from_pretrained`.
        what: Files to read: weights with their configuration, only the configuration, or the tokenizer.
    """
    if what == "tokenizer":
        texts = [path for pattern in _TOKENIZER_TEXTS for path in sorted(folder.glob(pattern))]
        problems = [*_problems_of_json(folder, _TOKENIZER), *(_stand_in(path) for path in texts)]
    else:
        problems = [*_problems_of_json(folder, _SETTINGS)]
        problems += _problems_of_weights(folder) if what == "weights" else []
    return next((problem for problem in problems if problem), None)


def _problems_of_json(folder: Path, names: tuple[str, ...]) -> Iterator[str | None]:
    for path in (folder / name for name in names):
        if path.is_file():
            found = _json(path)
            yield found if isinstance(found, str) else None


def _problems_of_weights(folder: Path) -> Iterator[str | None]:
    if (folder / "adapter_config.json").is_file() or not (folder / "config.json").is_file():
        return
    named = _json(folder / "config.json")
    own = named.get("transformers_weights") if isinstance(named, dict) else None
    has_scales = not isinstance(named, dict) or any(named.get(key) for key in _SCALES)
    path = next((folder / name for name in (own, *_WEIGHTS) if name and (folder / name).is_file()), None)
    if path is None:
        yield f"the folder holds no weights ({' or '.join(_WEIGHTS)}){_in_another_form(folder)}"
    elif path.suffix == ".json":
        yield from _problems_of_shards(path, has_scales)
    else:
        yield _problem_of_file(path, has_scales)


def _problems_of_shards(index: Path, has_scales: bool) -> Iterator[str | None]:
    content = _json(index)
    if isinstance(content, str):
        yield content
        return
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        yield f"{index.name} has no 'weight_map' of weights to files; {_AGAIN}"
        return
    for name in sorted(set(places.values())):
        path = index.parent / name
        missing = f"{index.name} names {name}, which is missing; {_AGAIN}"
        yield _problem_of_file(path, has_scales) if path.is_file() else missing


def _problem_of_file(path: Path, has_scales: bool) -> str | None:
    if (problem := _stand_in(path)) is not None:
        return problem
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                return None if has_scales else _without_scales(path, file)
        elif _starts_with(path, b"PK"):
            zipfile.ZipFile(path).close()
        elif not _starts_with(path, b"\x80"):  # first byte of `torch.save` files before the zip format
            return f"{path.name} is not a `torch.save` file; {_AGAIN}"
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        return f"{path.name} ({path.stat().st_size:,} bytes) is cut off or damaged ({error}); {_AGAIN}"
    return None


def _without_scales(path: Path, file: Any) -> str | None:
    """Return a message about an 8-bit matrix without quantization settings, or None."""
    for name in file.keys():  # noqa: SIM118 - it is not a mapping
        matrix = file.get_slice(name)
        if len(matrix.get_shape()) > 1 and name.endswith("weight") and matrix.get_dtype() in _EIGHT_BITS:
            return (
                f"{path.name} holds {name} in 8 bits ({matrix.get_dtype()}), and config.json has no "
                "quantization_config for reading it; use the unquantized model, or one with that "
                "setting"
            )
    return None


def _stand_in(path: Path) -> str | None:
    """Return a message if a file's first bytes show another kind of content; otherwise None."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip()
    except OSError as error:
        return f"{path.name} can't be read ({error.strerror})"
    if not start:
        return f"{path.name} is empty; {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return f"{path.name} is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        return f"{path.name} is an HTML page, such as a log-in or error page; {_AGAIN}"
    return None


def _json(path: Path) -> dict[str, Any] | str:
    """Return the JSON object of a file, or a message about the error."""
    if (problem := _stand_in(path)) is not None:
        return problem
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also encoding errors
        return f"{path.name} is not JSON ({error}); {_AGAIN}"
    return content if isinstance(content, dict) else f"{path.name} holds no JSON object; {_AGAIN}"


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _in_another_form(folder: Path) -> str:
    """Return the fix for weights in an unsupported format, or an empty text."""
    if gguf := sorted(folder.glob("*.gguf")):
        return f"; {gguf_problem(gguf[0])}"
    if any(folder.glob("consolidated*")):
        return "; consolidated files are the original release's: download the ones in the Hugging Face format"
    if any(any(folder.glob(pattern)) for pattern in ("*.h5", "*.msgpack", "*.onnx")):
        return "; weights for TensorFlow, Flax or ONNX are not read"
    return ""


def gguf_problem(path: Path) -> str:
    """Return a message about a GGUF file, a model for llama.cpp, with the fix."""
    return (
        f"{path.name} is GGUF, made to run and not to train; use the model that it was made from, or convert it with "
        f"`AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}).save_pretrained(...)`, "
        "and the tokenizer likewise"
    )
