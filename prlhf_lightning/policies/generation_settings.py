"""Generation configs of base models: their end tokens are used, their sampling settings are not.

All generation code follows `Sampling` only. The base model's penalties, truncations and suppressed tokens would change
the distribution that was trained. Penalties also count the prompt's tokens, but a soft prompt has no tokens, so
different programs would apply them differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prlhf_lightning.policies.base import Sampling

#: Settings that change which tokens are generated, with their neutral value (None is neutral too).
_NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_h": 1.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None,
        "min_length": 0,
        "min_new_tokens": 0,
        "num_beams": 1,
        "penalty_alpha": None,
        "guidance_scale": 1.0,
        "bad_words_ids": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "sequence_bias": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "stop_strings": [],
        "watermarking_config": None,
    }
)


def load_generation_config(path: str, revision: str | None, trust_remote_code: bool) -> GenerationConfig:
    """Return the generation config of a model folder or hub name; does not load the weights."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # older folders have none and store the ids in config.json
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def end_tokens_only(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], never: Sequence[int] = ()
) -> GenerationConfig:
    """Return a generation config with the given end tokens and neutral values for everything else.

    Args:
        tokenizer: Gives the BOS and padding ids.
        ends: Ids of the tokens that end an answer.
        never: Ids without a token, as in padded vocabularies; they are suppressed.
    """
    eos = ends[0] if len(ends) == 1 else list(ends)
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    if never:
        config.update(suppress_tokens=list(never))
    return config


def as_generation_config(
    sampling: Sampling, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], never: Sequence[int] = ()
) -> GenerationConfig:
    """Return the generation config that makes `generate` of transformers sample exactly as `sampling` says."""
    config = end_tokens_only(tokenizer, ends, never)
    config.update(max_new_tokens=sampling.max_new_tokens, use_cache=True, do_sample=sampling.temperature > 0)
    if sampling.temperature > 0:
        config.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    return config


@contextmanager
def in_place_of_own(lm: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation config within the block; `generate` reads missing settings from it."""
    own, lm.generation_config = lm.generation_config, config
    try:
        yield
    finally:
        lm.generation_config = own


def not_applied(config: GenerationConfig | None) -> dict[str, Any]:
    """Return the settings of a base model's generation config that would change generation and are not applied."""
    found = {name: getattr(config, name, None) for name in _NEUTRAL}
    return {name: value for name, value in found.items() if value is not None and value != _NEUTRAL[name]}


def warn_of_not_applied(config: GenerationConfig | None, model: str) -> None:
    """Warn of the settings of a base model's generation config that are not applied, if there are any."""
    if settings := not_applied(config):
        named = ", ".join(f"{name} {_short(value)}" for name, value in settings.items())
        warnings.warn(
            f"The generation config of {model} sets {named}. These are not applied: sampling uses only the "
            "temperature and top_p that you give (see docs/generate.md).",
            stacklevel=2,
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
