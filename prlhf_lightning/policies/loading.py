"""Loading and validation of language models: no missing, unexpected, non-finite or all-zero weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.utils.hashing import weights_digest

_log = logging.getLogger(__name__)
_LISTED = 3  # weights named in a message
_SAMPLED = 16  # weights per tensor, of about as many tensors, that identify a model in another dtype
_ROUNDING = 2.0**-7  # relative; bfloat16 keeps 8 bits
#: Files other than the weights that determine the base model's outputs, by their key in `base_identity`.
_FILES = {"config": "config.json", "generation_config": "generation_config.json", "tokenizer": "tokenizer"}
#: Settings that do not change what a model computes: its origin and how it is run. Dropout rates are ignored too.
_IGNORED_SETTINGS = ("dtype", "torch_dtype", "transformers_version", "use_cache")
#: Class-name suffixes of complete language models, possibly with parts for images.
_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: Modules of multi-part models that may contain the language model.
_TOPS = ("model", "transformer", "language_model", "model.language_model")


def load_lm(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, and reject one whose weights do not match its configuration.

    transformers itself replaces missing weights by random ones, which differ at each load.

    Args:
        path: A folder, or a hub name.
        options: For `from_pretrained`.

    Raises:
        ConfigurationError: Weights are missing, unexpected, of another shape, not finite, or all zero. The message
            names them and the fix; it does not name the path.
    """
    refuse_kernels(path, **options)
    avoid_cudnn_attention()
    try:
        with _without_report():
            lm, found = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise ConfigurationError(
            "transformers has no causal language model of its kind; it may be an encoder-decoder, or a model for "
            "images or speech only. Use a causal language model that `AutoModelForCausalLM` loads."
        ) from error
    if not getattr(lm, "_hf_peft_config_loaded", False):  # for an adapter, these are the adapter's own keys
        kinds = (found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        _check_names(lm, _written_by(lm, path, options) if any(found.values()) else "", *kinds)
    _check_numbers(lm)
    _note_untied(lm)
    for module in lm.modules():
        # bitsandbytes 0.50 rearranges 4-bit weights for some CPUs at their first use. `state_dict` should restore the
        # order, but leaves other weights in their place.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm


def avoid_cudnn_attention() -> None:
    """Exclude cuDNN from the kernels that torch chooses from for attention, in this process.

    On H100 and H200, torch 2.11 and later prefer it in half precision. Its backward returns NaN for some lengths of a
    batch with padding (pytorch/pytorch issue 196678), as in DPO (huggingface/trl issue 7181). This is a setting of the
    process and not of a call, because checkpointed layers choose again in the backward pass, and must choose the same.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def refuse_kernels(path: str, **options: Any) -> None:
    """Reject a `config.json` that makes transformers run attention code from the hub (package `kernels`).

    Args:
        path: A folder, or a hub name.
        options: For `from_pretrained`; `trust_remote_code` or `attn_implementation` shows the user's consent.

    Raises:
        ConfigurationError: It requests such code; the message does not name the path.
    """
    if options.get("trust_remote_code") or options.get("attn_implementation"):
        return
    try:
        content, _ = PreTrainedConfig.get_config_dict(path, revision=options.get("revision"))
    except (OSError, ValueError):
        return  # loading the model reports the error
    rest: list[Any] = [content]
    while rest:
        for name, value in rest.pop().items():
            values = list(value.values()) if isinstance(value, dict) else [value]
            kernel = next((one for one in values if isinstance(one, str) and "/" in one), None)
            if kernel and str(name).endswith(("attn_implementation", "experts_implementation")):
                raise ConfigurationError(
                    f"its config.json asks for code from the hub ({name}: {kernel[:100]!r}). If you trust it, set "
                    "trust_remote_code or policy.attn_implementation; if not, remove this entry from config.json."
                )
            if isinstance(value, dict):
                rest.append(value)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
    """Reject a tokenizer with ids that have no embedding in the model.

    More embeddings than tokens, as in padded vocabularies, are fine.

    Raises:
        ConfigurationError: Gives both numbers and the fix; it does not name the path.
    """
    rows, ids = lm.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    beyond = sorted((id_, token) for token, id_ in ids.items() if id_ >= rows)
    if not beyond:
        return
    raise ConfigurationError(
        f"the tokenizer has ids up to {beyond[-1][0]:,} and the model {rows:,} embeddings, so "
        f"{_some([repr(token) for _, token in beyond])} would have none. Use the tokenizer of these weights; or, if "
        "tokens were added on purpose, call `model.resize_token_embeddings(len(tokenizer))` and save the model."
    )


def unused_ids(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> list[int]:
    """Return the ids that a model can generate but that have no token, as in padded vocabularies."""
    head = lm.get_output_embeddings()
    rows = (head if head is not None else lm.get_input_embeddings()).weight.shape[0]
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def base_identity(lm: PreTrainedModel) -> dict[str, str]:
    """Return the identity of a loaded model and its settings; see `Policy.base_identity`."""
    config = getattr(lm, "generation_config", None)
    return {
        "weights": weights_digest(lm.state_dict().items()),
        "config": _settings_digest(lm.config.to_dict()),
        "generation_config": _settings_digest(config.to_dict() if config is not None else {}),
        "transformers": transformers.__version__,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "sample": " ".join(f"{value:.9g}" for value in _sample(lm)),
    }


def warning_of_other_base(trained_on: Mapping[str, str] | None, now: Mapping[str, str] | None, name: str) -> str | None:
    """Return a warning if a model is not the base model of a checkpoint or export; None if it is.

    With another base model of equal shape, trained weights load without error and generate nonsense. Settings and
    tokenizer are compared if both identities have them and the version of transformers, which sets defaults, is equal.

    Args:
        trained_on: `Policy.base_identity` in training; older checkpoints and folders have none.
        now: `Policy.base_identity` of the loaded model.
        name: Name of the model, for the message.
    """
    if not trained_on or not now:
        return None
    if trained_on["weights"] == now["weights"]:
        return _warning_of_other_files(trained_on, now, name)
    if _differ_in_dtype_alone(trained_on, now):
        _log.warning("The base model %s had dtype %s in training, and %s now.", name, trained_on["dtype"], now["dtype"])
        return _warning_of_other_files(trained_on, now, name)
    versions = {base["transformers"] for base in (trained_on, now)}
    perhaps = (
        "" if len(versions) == 1 else f" (or transformers {' and '.join(sorted(versions))} arrange them differently)"
    )
    return (
        f"The weights of the base model {name} are not those of training{perhaps}. The trained weights fit only their "
        "own base model: restore it, or give its new path with the `relocate` command."
    )


def _warning_of_other_files(trained_on: Mapping[str, str], now: Mapping[str, str], name: str) -> str | None:
    """Return a warning if a model's settings or tokenizer differ from training; its weights are equal."""
    if trained_on["transformers"] != now["transformers"]:
        return None
    both = trained_on.keys() & now.keys()
    other = [file for key, file in _FILES.items() if key in both and trained_on[key] != now[key]]
    if not other:
        return None
    return (
        f"The base model {name} has the weights of training but another {' and '.join(other)}: a file was damaged or "
        "changed. Restore the files, or download the model again."
    )


def _settings_digest(settings: Mapping[str, Any]) -> str:
    return sha256(json.dumps(_relevant(settings), sort_keys=True, default=str).encode()).hexdigest()


def _relevant(settings: Any) -> Any:
    """Return a copy of nested settings without those that do not change what a model computes."""
    if not isinstance(settings, Mapping):
        return settings
    kept = {str(key): _relevant(value) for key, value in settings.items()}
    return {k: v for k, v in kept.items() if k not in _IGNORED_SETTINGS and not k.startswith("_") and "drop" not in k}


@torch.no_grad()
def _sample(lm: PreTrainedModel) -> list[float]:
    """Return a sample of a model's weights, at the same indices in every dtype."""
    wide = [weight.flatten() for _, weight in sorted(lm.state_dict().items()) if weight.is_floating_point()]
    found: list[float] = []
    for weight in wide[:: max(1, len(wide) // _SAMPLED)]:
        found += weight[:: max(1, len(weight) // _SAMPLED)][:_SAMPLED].float().tolist()
    return found


def _differ_in_dtype_alone(trained_on: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Return whether two identities are of one model in two dtypes, up to rounding; older identities have no dtype."""
    if trained_on.get("dtype") == now.get("dtype") or not (trained_on.get("sample") and now.get("sample")):
        return False
    then, here = (torch.tensor([float(value) for value in base["sample"].split()]) for base in (trained_on, now))
    return then.shape == here.shape and torch.allclose(then, here, rtol=_ROUNDING, atol=1e-6)


def _written_by(lm: PreTrainedModel, path: str, options: Mapping[str, Any]) -> str:
    """Return the class of the weights according to `config.json`; a loaded model's config may be only a part of it."""
    how = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = lm.config if lm.config.architectures else AutoConfig.from_pretrained(path, **how)
    return " or ".join(config.architectures or ()) or "another class"


def _check_names(
    lm: PreTrainedModel,
    written_by: str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Collection[int], Collection[int]]],
) -> None:
    here = type(lm).__name__
    if mismatched:
        shapes = [f"{name} is {list(saved)} in the file and {list(ours)} here" for name, saved, ours in mismatched]
        raise ConfigurationError(
            f"the weights have other shapes than its config.json says ({_some(shapes)}). Use weights and config.json "
            "of the same model."
        )
    instead = f" It has weights of {written_by} instead: {_some(unexpected)}." if unexpected else ""
    if missing:
        raise ConfigurationError(
            f"the files lack {_count(missing)} of a {here}, which would be random, and different at each load: "
            f"{_some(missing)}.{instead} Use a folder with the complete language model."
        )
    if not unexpected:
        return
    left_out = [name for name in unexpected if _is_within(name, lm)]
    if left_out or not written_by.endswith((here, *_LM_SUFFIXES)):
        raise ConfigurationError(
            f"the files have {_count(unexpected)} that a {here} with this config.json lacks: "
            f"{_some(left_out or unexpected)}; config.json names {written_by}. Without them, the model would compute "
            "something else: use the language model that it was made from, or the config.json of these weights."
        )
    # Parts next to a complete language model, such as the value head of a PPO run or an image encoder.
    _log.warning("%s that a %s lacks, ignored: %s.", _count(unexpected), here, _some(unexpected))


def _is_within(name: str, lm: PreTrainedModel) -> bool:
    """Return whether a weight name lies inside one of the model's modules."""
    parts = name.split(".")
    tops = {"", lm.base_model_prefix, *_TOPS}
    known = {prefix for prefix, _ in lm.named_modules()}
    return any(".".join(parts[:end]) in known - tops for end in range(1, len(parts)))


@torch.no_grad()
def _check_numbers(lm: PreTrainedModel) -> None:
    wide = {name: weight for name, weight in lm.named_parameters() if weight.is_floating_point() and weight.numel()}
    extremes = {name: torch.stack(torch.aminmax(weight)) for name, weight in wide.items() if weight.itemsize > 1}
    if wrong := [name for name, pair in extremes.items() if not _are_finite(pair)]:
        dtype = str(lm.dtype).removeprefix("torch.")
        hint = " bfloat16 and float32 hold larger numbers; set policy.dtype." if lm.dtype == torch.float16 else ""
        raise ConfigurationError(
            f"{_count(wrong)} with NaN or infinity in {dtype}: {_some(wrong)}.{hint} Use a model from before its "
            "training diverged, or download it again."
        )
    zero = {name for name, pair in extremes.items() if wide[name].ndim > 1 and not pair.any()}
    if zero and (wrong := _unintended_zeros(lm, zero, {name for name in extremes if wide[name].ndim > 1})):
        raise ConfigurationError(
            f"{_count(wrong)} with zeros only, as in an incompletely written file: {_some(wrong)}. Download the model "
            "again, or save it again."
        )


def _unintended_zeros(lm: PreTrainedModel, zero: set[str], matrices: set[str]) -> list[str]:
    """Return the all-zero matrices that no model has on purpose.

    A single one may be intended: layers added to a model often start with zeros. Zero embeddings or a zero head are
    not, and neither are all matrices of a layer or of attention.
    """
    ends = [module.weight for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None]
    parts = [{name} for name, weight in lm.named_parameters() if any(weight is end for end in ends)]
    layers: dict[str, set[str]] = {}
    for name in matrices:
        if numbered := re.match(r".*?\.\d+(?=\.)", name):
            layers.setdefault(numbered[0], set()).add(name)
    attention = {name for name in matrices if "attn" in name or "attention" in name}
    return sorted(set().union(*(part for part in (*parts, *layers.values(), attention) if part <= zero)))


def _note_untied(lm: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to false in the configuration if the model has its own head.

    Otherwise, programs that trust the configuration would use the embeddings as the head of an export.
    """
    head, words = lm.get_output_embeddings(), lm.get_input_embeddings()
    config = lm.config.get_text_config()
    if config.tie_word_embeddings and head is not None and head.weight is not words.weight:
        config.tie_word_embeddings = lm.config.tie_word_embeddings = False


def _count(names: Collection[str]) -> str:
    return "1 weight" if len(names) == 1 else f"{len(names)} weights"


def _are_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _some(names: Collection[str]) -> str:
    shown = sorted(names, key=_natural)[:_LISTED]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the load report of transformers; one line of our own replaces it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
