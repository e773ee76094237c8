"""The backbone of a reward model: a frozen language model or text encoder, and the pooling of its hidden states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.loading import base_identity, check_vocabulary, load_lm, refuse_kernels
from prlhf_lightning.types import Tokens
from prlhf_lightning.utils.hub import loading
from prlhf_lightning.utils.shipped import ASSETS

Pooling: TypeAlias = Literal["auto", "last", "mean"]
_BUILTIN = "builtin:"
#: Weights that are not used here and that checkpoints of encoders often lack.
_UNUSED = ("pooler",)


class RewardBackbone(nn.Module):
    """A frozen model that maps a prompt and a completion to a vector.

    A causal language model is read at the last token of the completion, which alone has seen all others. The positions
    are counted from the text's own length: a tokenizer may pad with its end token, so that the first pad looks like the
    end of a completion. An encoder is averaged over the tokens of the completion, which have all seen the prompt.

    Args:
        model: Folder or hub name of a causal language model or an encoder, or `builtin:style-lm`.
        pooling: `last` or `mean`; `auto` takes `last` for causal models and `mean` for encoders.
        dtype: Of the weights: `auto` for that of the files, or `float32`, `bfloat16`, `float16`.
        batch_size: Texts in a pass.
        revision: Branch, tag or commit of a hub name.
    """

    def __init__(
        self,
        model: str,
        pooling: Pooling = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_size: int = 32,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigurationError(f"backbone.pooling is {pooling!r}; it must be one of {get_args(Pooling)}.")
        if batch_size < 1:
            raise ConfigurationError(f"backbone.batch_size is {batch_size}; it must be at least 1.")
        self.name, self.dtype, self.batch_size, self.revision = model, dtype, batch_size, revision
        self._pooling: Pooling = pooling

    @property
    def path(self) -> str:
        """Folder or hub name of the files."""
        if self.name.startswith(_BUILTIN):
            return str(ASSETS / self.name.removeprefix(_BUILTIN))
        return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name

    def _loading(self, what: Literal["weights", "tokenizer"]) -> Any:
        fix = "give a folder written by `save_pretrained` (with the tokenizer), or a hub name within reach."
        return loading(self.path, what, f"backbone.model: the {what} of {self.name!r}", fix)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; that of an encoder ends texts with its separator, that of a model without pads with EOS."""
        with self._loading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision)
        if tokenizer.eos_token is None and tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def build(self) -> None:
        """Load the weights, and freeze them."""
        with self._loading("weights"):
            config = AutoConfig.from_pretrained(self.path, revision=self.revision)
            options = {"revision": self.revision, "dtype": self.dtype}
            # The whole language model is checked, then its head is left out.
            lm = load_lm(self.path, **options).base_model if _is_causal(config) else _load_encoder(self.path, options)
            check_vocabulary(self.tokenizer, lm)
        self.model: PreTrainedModel = lm.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> RewardBackbone:
        """Stay in evaluation mode: dropout would change cached features."""
        return super().train(False)

    @property
    def width(self) -> int:
        """Size d of a vector."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def pooling(self) -> Literal["last", "mean"]:
        """The pooling that is used."""
        if self._pooling != "auto":
            return self._pooling
        return "last" if _is_causal(self.model.config) else "mean"

    @property
    def max_length(self) -> int | None:
        """Most tokens of a text, for models with learned positions."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def identity(self) -> dict[str, str]:
        """Return everything that vectors depend on besides the tokens: weights, settings and pooling."""
        return {**base_identity(self.model), "pooling": self.pooling}

    @torch.no_grad()
    def forward(self, prompts: Sequence[npt.NDArray[np.int64]], completions: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """Return the vectors of texts, `[n, d]` float32, computed in batches of similar length.

        Args:
            prompts: n prompts as token ids. A text over the model's limit loses the start of its prompt.
            completions: n completions as token ids, not empty.
        """
        device = next(self.model.parameters()).device
        rows = [self._joined(*text) for text in zip(prompts, completions, strict=True)]
        vectors = torch.zeros(len(rows), self.width, device=device)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            tokens = Tokens.from_lists([rows[row][0] for row in batch], self.tokenizer.pad_token_id or 0).to(device)
            own = torch.tensor([rows[row][1] for row in batch], device=device)
            vectors[batch] = self._pooled(tokens, own)
        return vectors

    def _pooled(self, tokens: Tokens, own: Tensor) -> Tensor:
        """Return the vectors `[n, d]` of rows padded on the right, whose last `own` `[n]` tokens are completions."""
        # Positions are given: some models count them from the mask, others from the start of the row.
        positions = torch.arange(tokens.ids.shape[1], device=tokens.ids.device).expand_as(tokens.ids)
        mask = tokens.mask.long()
        given = {"position_ids": positions} if self._takes_positions else {}
        hidden = self.model(input_ids=tokens.ids, attention_mask=mask, **given).last_hidden_state.float()
        lengths = tokens.mask.sum(1)
        if self.pooling == "last":
            last: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
            return last
        counted = tokens.mask & (positions >= (lengths - own)[:, None])
        mean: Tensor = (hidden * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        return mean

    @property
    def _takes_positions(self) -> bool:
        # Encoders such as RoBERTa count positions from an offset of their own.
        return self.pooling == "last"

    def _joined(
        self, prompt: npt.NDArray[np.int64], completion: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Return a text's ids and the number of them that belong to the completion."""
        limit = self.max_length
        if limit is not None and len(prompt) + len(completion) > limit:
            completion = completion[:limit]
            prompt = prompt[len(prompt) + len(completion) - limit :]
        return np.concatenate([prompt, completion]), len(completion)


def _is_causal(config: PreTrainedConfig) -> bool:
    """Return whether a model is a language model from left to right; encoders may also have such a variant."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _load_encoder(path: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load an encoder, and reject one whose weights are not complete."""
    refuse_kernels(path, **options)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its report of unused heads; missing weights are refused below
    try:
        encoder, found = AutoModel.from_pretrained(path, output_loading_info=True, **options)
    finally:
        logger.setLevel(level)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(_UNUSED))
    if missing:
        raise ConfigurationError(
            f"the files lack {len(missing)} weights of a {type(encoder).__name__}, which would be random: "
            f"{', '.join(missing[:3])}. Use a folder with the complete model."
        )
    if encoder.config.is_encoder_decoder:
        raise ConfigurationError("it is an encoder-decoder; use a causal language model or an encoder.")
    model: PreTrainedModel = encoder
    return model
