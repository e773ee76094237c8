"""The exported folder: a Hugging Face model folder with a user model.

In addition to the model (merged, or as adapters to a base model) and its tokenizer it holds:

- `prlhf.json`: the user model's class and settings, how text is tokenized, the format's version, and the SHA-256 of the
  files that are read. Written last.
- `user_model.safetensors`: the user model's weights.
- `users.json`: the user ids in row order; row 0, the generic user, has none.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.policies.loading import base_identity, check_vocabulary, load_lm, warning_of_other_base
from prlhf_lightning.user_models import UserModel
from prlhf_lightning.user_models.shapes import shapes_when_built
from prlhf_lightning.utils.finite import check_finite
from prlhf_lightning.utils.hashing import SETTINGS, check_checksums, with_checksums
from prlhf_lightning.utils.hub import loading
from prlhf_lightning.utils.load_errors import opening
from prlhf_lightning.utils.trust import named_by_file, only_trusted_classes

#: Increased when older versions can no longer read the folders. Format 1 has no checksums.
FORMAT = 2
WEIGHTS, USERS = "user_model.safetensors", "users.json"


@dataclass(frozen=True)
class FolderContent:
    """The loaded content of an exported folder."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    user_model: UserModel
    vocabulary: UserVocabulary
    tokenization: TokenizationSettings
    name: str


def settings_json(
    folder: Path, name: str, user_model: Mapping[str, Any], tokenization: TokenizationSettings, **more: Any
) -> str:
    """Return the text of `prlhf.json`.

    Args:
        folder: The folder with all other files.
        name: Name of the model.
        user_model: The user model's `class_path` and `init_args`.
        tokenization: Tokenization settings.
        more: Further entries, for people to read.
    """
    content = {"format": FORMAT, "name": name, "user_model": user_model, "tokenization": asdict(tokenization), **more}
    return json.dumps(with_checksums(folder, content), indent=2, ensure_ascii=False) + "\n"


def read_folder(
    folder: Path, trust_remote_code: bool = False, trust_classes: Collection[str] | None = None
) -> FolderContent:
    """Load an exported folder on the CPU and return its content.

    Args:
        folder: The folder.
        trust_remote_code: Run code that comes with the language model. Only for sources that you trust.
        trust_classes: Classes from outside this package that the folder may name.

    Raises:
        ConfigurationError: Something is missing, damaged, of a later version, or names classes that are not trusted.
    """
    with opening(str(folder), "Export the folder again."):
        return _read_folder(folder, trust_remote_code, trust_classes)


def _read_folder(folder: Path, trust_remote_code: bool, trust_classes: Collection[str] | None) -> FolderContent:
    settings = _json(folder / SETTINGS)
    if settings.get("format") not in range(1, FORMAT + 1):
        raise ConfigurationError(
            f"{folder / SETTINGS}: format is {settings.get('format')!r}, and this version reads formats up to {FORMAT};"
            " use the version that wrote the folder, or a later one."
        )
    if "backbone" in settings:
        raise ConfigurationError(f"{folder} is an exported reward model, which writes no text; give a policy.")
    for field in ("name", "user_model", "tokenization"):
        _get(settings, field, folder / SETTINGS)
    with only_trusted_classes(folder / SETTINGS, trust_classes, trust_remote_code, settings):
        return _loaded(folder, settings, trust_remote_code)


def _loaded(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> FolderContent:
    try:
        vocabulary = UserVocabulary(_get(_json(folder / USERS), "users", folder / USERS))
    except ConfigurationError as error:
        named = str(folder / USERS)
        raise error if named in str(error) else ConfigurationError(f"{named}: {error}") from error
    with loading(str(folder), "tokenizer", f"{folder}: the tokenizer", "export the folder again."):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer.decode(tokenizer("x")["input_ids"])  # malformed tokenizers may load and fail here
    lm = _load_lm(folder, settings, trust_remote_code)
    with loading(str(folder), "tokenizer", f"{folder}: the tokenizer", ""):
        check_vocabulary(tokenizer, lm)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    user_model = instantiate(settings["user_model"], str(folder / SETTINGS))
    # The random initialization is replaced, and the global random state is preserved. GPUs are excluded, since torch
    # would warn.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        words = torch.arange(min(2, lm.get_input_embeddings().weight.shape[0]))
        embeddings = lm.get_input_embeddings()(words)
        # Sizes in the settings are compared with the file before memory is allocated.
        needed = shapes_when_built(user_model, len(vocabulary), embeddings)
        held = _shapes_in(folder / WEIGHTS)
        if other := [name for name, shape in needed.items() if held.get(name) != shape]:
            raise ConfigurationError(
                f"{folder / WEIGHTS} does not fit {SETTINGS} and {USERS}: {other[0]} is {held.get(other[0])} there, "
                f"and {needed[other[0]]} by the settings and the number of users. Export the folder again."
            )
        user_model.build(len(vocabulary), embeddings)
    try:
        weights = load_file(folder / WEIGHTS)
        user_model.load_state_dict(weights)
        if wrong := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
            raise ConfigurationError(f"{folder / WEIGHTS}: {wrong[0]} has NaN or infinity; export the folder again.")
    except (OSError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())
        raise ConfigurationError(f"{folder / WEIGHTS} does not fit {SETTINGS} or can't be read: {told}") from error
    check_checksums(folder, settings)  # last: errors about the content itself are more informative
    check_finite({"state_dict": user_model.state_dict()}, str(folder / WEIGHTS))
    tokenization = TokenizationSettings.from_kept(settings["tokenization"])
    return FolderContent(lm, tokenizer, user_model, vocabulary, tokenization, settings["name"])


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a file without reading them."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} does not fit {SETTINGS} or can't be read: {error}") from error


def _load_lm(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    whole = loading(str(folder), "weights", f"{folder}: the model", "export the folder again.")
    if not (folder / "adapter_config.json").is_file():
        with whole:
            return load_lm(str(folder), **options)
    adapter = _adapter(folder / "adapter_config.json")
    base = str(settings.get("base", ""))
    # The path of a shipped model differs between machines.
    path = CausalLMPolicy(base).path if base.startswith("builtin:") else str(adapter.get("base_model_name_or_path"))
    options |= {"dtype": settings.get("base_dtype", "auto"), "revision": adapter.get("revision")}
    fix = (
        "if it has moved, write its path into base_model_name_or_path of adapter_config.json, or export without "
        "`--adapters true`, which needs no base model."
    )
    with loading(path, "weights", f"{folder}: its base model {path!r}", fix):
        lm = load_lm(path, **options)
    if "base_identity" in settings and (
        warning := warning_of_other_base(settings["base_identity"], base_identity(lm), path)
    ):
        warnings.warn(f"{folder}: {warning}", stacklevel=2)
    with whole, warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted: PreTrainedModel = PeftModel.from_pretrained(lm, folder).get_base_model()
    check_finite({"state_dict": {n: p for n, p in adapted.named_parameters() if "lora_" in n}}, str(folder))
    return adapted


def _adapter(path: Path) -> dict[str, Any]:
    """Return the settings of adapters; refuse settings for which PEFT would import modules by name."""
    content = _json(path)
    kind, megatron = content.get("peft_type"), content.get("megatron_config")
    if kind != "LORA" or megatron:
        what = f"peft_type is {kind!r}" if kind != "LORA" else "megatron_config is set"
        raise ConfigurationError(f"{path}: {what}, which `export` never writes; export the folder again.")
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        last = path.parent / "checkpoints/last.ckpt"
        instead = f"the run's checkpoint, as {last}" if last.exists() else "a folder that `export` wrote"
        raise ConfigurationError(f"{path.parent} has no {path.name}; give {instead}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON ({error}); export the folder again.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no JSON object; export the folder again.")
    return content


def _get(content: Mapping[str, Any], field: str, path: Path) -> Any:
    if field not in content:
        raise ConfigurationError(f"{path} has no {field!r}; export the folder again.")
    return content[field]


def instantiate(spec: Mapping[str, Any], where: str) -> UserModel:
    """Return a user model from `{class_path, init_args}`; nested mappings of this form are instantiated first.

    Only user models are instantiated, so a folder cannot run other code.

    Raises:
        ConfigurationError: The class cannot be imported, is not a user model, or refuses its arguments.
    """
    try:
        cls = named_by_file(str(spec.get("class_path", "")))
    except ConfigurationError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{where}: the user model {spec.get('class_path')!r} cannot be imported; install its package."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, UserModel)):
        raise ConfigurationError(f"{where}: {spec['class_path']!r} is no user model.")
    arguments = {key: _argument(value, where) for key, value in (spec.get("init_args") or {}).items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {spec['class_path']}: {error}; use the version that wrote it.") from error


def _argument(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return instantiate(value, where)
    return [_argument(item, where) for item in value] if isinstance(value, list) else value
