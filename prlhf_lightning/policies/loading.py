"""Loading a language model that is whole: every weight there, none left over, all of them numbers, not just zeros."""

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
_LISTED = 3  # weights that a message names
_SAMPLED = 16  # weights of a tensor, and about as many tensors, by which a model is known again in another dtype
_ROUNDING = 2.0**-7  # relative; bfloat16 keeps 8 bits
#: What else than the weights of a base model decides what is computed and written, by its key in `base_identity`.
_FILES = {"config": "config.json", "generation_config": "generation_config.json", "tokenizer": "tokenizer"}
#: Settings that say where a model is from and how it is run, and not what it computes; rates of dropout, beside them.
_NO_MATTER = ("dtype", "torch_dtype", "transformers_version", "use_cache")
#: How classes are called that hold a whole language model, maybe beside parts for images.
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: Where models keep the parts of which a language model may be one.
_TOPS = ("model", "transformer", "language_model", "model.language_model")


def load_lm(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, and refuse one whose weights are not those of its configuration.

    transformers replaces missing weights by random ones, which differ at each load, and goes on.

    Args:
        path: A folder, or a hub name.
        options: For `from_pretrained`.

    Raises:
        ConfigurationError: Weights are missing, left over, of another shape, not finite, or zero throughout. The
            message says which and what to do; it does not name the path.
    """
    refuse_kernels(path, **options)
    try:
        with _without_report():
            lm, found = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise ConfigurationError(
            "it is of a kind that transformers has no causal language model of, such as an encoder-decoder, or a model "
            "of images or speech alone. Take a causal language model, which `AutoModelForCausalLM` loads."
        ) from error
    if not getattr(lm, "_hf_peft_config_loaded", False):  # of an adapter, these are the adapter's own
        kinds = (found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        _check_names(lm, _written_by(lm, path, options) if any(found.values()) else "", *kinds)
    _check_numbers(lm)
    _note_untied(lm)
    for module in lm.modules():
        # bitsandbytes 0.50 arranges 4-bit weights anew for some CPUs when they are first used, and `state_dict`, which
        # would arrange them back, leaves others in their place.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm


def refuse_kernels(path: str, **options: Any) -> None:
    """Refuse a `config.json` that would have transformers run attention code from the hub (of the package `kernels`).

    Args:
        path: A folder, or a hub name.
        options: For `from_pretrained`; either of `trust_remote_code` and `attn_implementation` is the user's word.

    Raises:
        ConfigurationError: It names such code; the message does not name the path.
    """
    if options.get("trust_remote_code") or options.get("attn_implementation"):
        return
    try:
        content, _ = PreTrainedConfig.get_config_dict(path, revision=options.get("revision"))
    except (OSError, ValueError):
        return  # what is wrong is said when it is loaded
    rest: list[Any] = [content]
    while rest:
        for name, value in rest.pop().items():
            values = list(value.values()) if isinstance(value, dict) else [value]
            kernel = next((one for one in values if isinstance(one, str) and "/" in one), None)
            if kernel and str(name).endswith(("attn_implementation", "experts_implementation")):
                raise ConfigurationError(
                    f"its config.json asks for code of the hub ({name}: {kernel[:100]!r}). Where you trust it, set "
                    "trust_remote_code, or policy.attn_implementation; else take that out of config.json."
                )
            if isinstance(value, dict):
                rest.append(value)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
    """Refuse a tokenizer that makes ids for which a model has no embedding.

    More embeddings than tokens, as in padded vocabularies, are no error.

    Raises:
        ConfigurationError: Names both numbers and what to do; it does not name the path.
    """
    rows, ids = lm.get_input_embeddings().weight.shape[0], tokenizer.get_vocab()
    beyond = sorted((id_, token) for token, id_ in ids.items() if id_ >= rows)
    if not beyond:
        return
    raise ConfigurationError(
        f"the tokenizer has ids up to {beyond[-1][0]:,} and the model {rows:,} embeddings, so that "
        f"{_some([repr(token) for _, token in beyond])} would have none. Take the tokenizer that belongs to these "
        "weights; or, where tokens were added on purpose, call `model.resize_token_embeddings(len(tokenizer))` and "
        "save the model."
    )


def unused_ids(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> list[int]:
    """Return the ids that a model can write and its tokenizer has no token for, as in padded vocabularies."""
    head = lm.get_output_embeddings()
    rows = (head if head is not None else lm.get_input_embeddings()).weight.shape[0]
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def base_identity(lm: PreTrainedModel) -> dict[str, str]:
    """Return what tells the model that was loaded, with its settings; see `Policy.base_identity`."""
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
    """Return what to warn of where a model is not the one that something was trained on.

    Of equal shape, what was trained loads all the same, and writes nonsense. Settings and tokenizer are compared where
    both identities have them, under the same version of transformers, which has defaults of its own.

    Args:
        trained_on: `Policy.base_identity` of that time; older checkpoints and folders have none.
        now: The same of the model that was loaded.
        name: What the model is called.
    """
    if not trained_on or not now:
        return None
    if trained_on["weights"] == now["weights"]:
        return _warning_of_other_files(trained_on, now, name)
    if _differ_in_dtype_alone(trained_on, now):
        _log.warning("The base model %s had dtype %s in training, and %s now.", name, trained_on["dtype"], now["dtype"])
        return _warning_of_other_files(trained_on, now, name)
    versions = {base["transformers"] for base in (trained_on, now)}
    perhaps = "" if len(versions) == 1 else f" (or transformers, {' and '.join(sorted(versions))}, arranges them anew)"
    return (
        f"The weights of the base model {name} are not those that were trained on{perhaps}. What was trained fits no "
        "others: give the model of that time back its place, or name its new one with the `relocate` command."
    )


def _warning_of_other_files(trained_on: Mapping[str, str], now: Mapping[str, str], name: str) -> str | None:
    """Return what to warn of where a model's settings or tokenizer are not those of training, and its weights are."""
    if trained_on["transformers"] != now["transformers"]:
        return None
    both = trained_on.keys() & now.keys()
    other = [file for key, file in _FILES.items() if key in both and trained_on[key] != now[key]]
    if not other:
        return None
    return (
        f"The base model {name} has the weights that were trained on, and another {' and '.join(other)} than in "
        "training: a file there was damaged or changed. Give the files of that time back their place, or download the "
        "model again."
    )


def _settings_digest(settings: Mapping[str, Any]) -> str:
    return sha256(json.dumps(_that_matter(settings), sort_keys=True, default=str).encode()).hexdigest()


def _that_matter(settings: Any) -> Any:
    """Return a copy of nested settings without those that do not decide what is computed."""
    if not isinstance(settings, Mapping):
        return settings
    kept = {str(key): _that_matter(value) for key, value in settings.items()}
    return {k: v for k, v in kept.items() if k not in _NO_MATTER and not k.startswith("_") and "drop" not in k}


@torch.no_grad()
def _sample(lm: PreTrainedModel) -> list[float]:
    """Return some of a model's weights, at the same places in every dtype."""
    wide = [weight.flatten() for _, weight in sorted(lm.state_dict().items()) if weight.is_floating_point()]
    found: list[float] = []
    for weight in wide[:: max(1, len(wide) // _SAMPLED)]:
        found += weight[:: max(1, len(weight) // _SAMPLED)][:_SAMPLED].float().tolist()
    return found


def _differ_in_dtype_alone(trained_on: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether two identities are of one model in two dtypes, as far as rounding lets tell; older ones have no dtype."""
    if trained_on.get("dtype") == now.get("dtype") or not (trained_on.get("sample") and now.get("sample")):
        return False
    then, here = (torch.tensor([float(value) for value in base["sample"].split()]) for base in (trained_on, now))
    return then.shape == here.shape and torch.allclose(then, here, rtol=_ROUNDING, atol=1e-6)


def _written_by(lm: PreTrainedModel, path: str, options: Mapping[str, Any]) -> str:
    """Return which class `config.json` says that the weights are of; a model may have only a part of that file."""
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
            f"the weights have other shapes than its config.json says ({_some(shapes)}). Take weights and config.json "
            "of the same model."
        )
    instead = f" It has weights of {written_by} instead: {_some(unexpected)}." if unexpected else ""
    if missing:
        raise ConfigurationError(
            f"the files lack {_count(missing)} of a {here}, which would be random, and others at each load: "
            f"{_some(missing)}.{instead} Take a folder with the whole language model."
        )
    if not unexpected:
        return
    left_out = [name for name in unexpected if _is_within(name, lm)]
    if left_out or not written_by.endswith((here, *_WRITERS)):
        raise ConfigurationError(
            f"the files have {_count(unexpected)} that a {here} of this config.json lacks: "
            f"{_some(left_out or unexpected)}; config.json names {written_by}. A model of another kind or size would "
            "do something else without them: take the language model that it was made from, or the config.json that "
            "belongs to it."
        )
    # Beside a whole language model, such as the value head of a PPO run, or what reads images.
    _log.warning("%s that a %s lacks, left out: %s.", _count(unexpected), here, _some(unexpected))


def _is_within(name: str, lm: PreTrainedModel) -> bool:
    """Tell whether a weight would belong to a part of a model, and not beside its parts."""
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
            f"{_count(wrong)} with NaN or infinity in {dtype}: {_some(wrong)}.{hint} Take a model from before its "
            "training went wrong, or download it again."
        )
    zero = {name for name, pair in extremes.items() if wide[name].ndim > 1 and not pair.any()}
    if zero and (wrong := _never_meant(lm, zero, {name for name in extremes if wide[name].ndim > 1})):
        raise ConfigurationError(
            f"{_count(wrong)} with zeros only, as of a file that was not written to its end: {_some(wrong)}. Download "
            "the model again, or save it again."
        )


def _never_meant(lm: PreTrainedModel, zero: set[str], matrices: set[str]) -> list[str]:
    """Return those of the matrices of zeros that no model has on purpose.

    A single one may be meant, as layers that are added to a model begin by changing nothing. Those of embeddings and
    head are not, and neither are all that a layer has, or all of attention.
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
    """Say in the configuration what transformers has found: a head of its own, where one of the embeddings was named.

    Programs that believe the configuration would else use the embeddings in an export.
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
    """Sort `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from printing a table of what is said in one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
