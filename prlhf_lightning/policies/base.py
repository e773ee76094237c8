"""Base class of policies, and sampling settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens
from prlhf_lightning.utils.chat_tokens import end_token_ids


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of generation.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Probability mass of nucleus sampling, in (0, 1].
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Reject values out of range."""
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"sampling.max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(
                f"sampling.temperature is {self.temperature}; it must be 0 (greedy decoding) or more."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"sampling.top_p is {self.top_p}; it must be above 0, and 1 at most.")


class Policy(nn.Module, ABC):
    """Base class: a language model conditioned on soft-prompt vectors, `pi(y | x, u)` of arXiv:2402.05133.

    Sequences are `[BOS] [soft prompt] [prompt] [completion]`, without BOS if the prompt has none. `build` loads the
    weights; constructing a policy and reading its tokenizer are cheap.

    Attributes:
        writes: Whether it generates text. False for a reward model, whose `log_probs` hold rewards: the sum over a
            completion is its reward.
    """

    writes: ClassVar[bool] = True

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer for the data."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer; see `prlhf_lightning.utils.chat_tokens`."""
        return end_token_ids(self.tokenizer)

    @abstractmethod
    def build(self, with_reference: bool = True) -> None:
        """Load or create the weights.

        Args:
            with_reference: Whether `reference_log_probs` will be called.
        """

    def prepare_for_sharding(self) -> list[nn.Module]:
        """Prepare for FSDP and return the modules to wrap one by one, such as the layers.

        Afterwards all processes must call these modules equally often in each method, whatever their rows.
        """
        return []

    @property
    def max_positions(self) -> int | None:
        """Most positions (vectors and tokens) of a sequence; None for no limit. Needs a built policy."""
        return None

    @abstractmethod
    def token_embeddings(self) -> Tensor:
        """Return input embeddings sampled evenly from the vocabulary, `[n, d]`, to initialize soft prompts."""

    @abstractmethod
    def embed(self, tokens: Tokens, reference: bool = False) -> SoftPrompt:
        """Return the input embeddings of tokens as vectors, `[B, L, d]`.

        Args:
            tokens: B texts.
            reference: Use the embeddings from before training.
        """

    @abstractmethod
    def log_probs(
        self,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None = None,
        temperature: float = 1.0,
    ) -> tuple[LogProbs, ...]:
        """Score several completions of the same prompts.

        Args:
            prompt: B prompts.
            completions: One or more batches of B completions of those prompts.
            soft_prompt: B soft prompts, or None.
            temperature: Divides the logits, for completions that were sampled at another temperature than 1.

        Returns:
            For each batch of completions, its per-token log-probabilities `[B, L]`, differentiable.
        """

    @abstractmethod
    def reference_log_probs(
        self,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None = None,
        temperature: float = 1.0,
    ) -> tuple[LogProbs, ...]:
        """Score completions as `log_probs` does, under the policy from before training and without gradient."""

    def reference_identity(self) -> dict[str, str] | None:
        """Return digests and settings that determine the reference log-probs: the key of their disk cache.

        None, if the policy cannot identify its reference, disables the cache.
        """
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return and clear the policy's own loss term `[]` from the last `log_probs`; None if it has none."""
        return None

    def training_notes(self) -> Sequence[str]:
        """Return notes to show once when training starts; needs a built policy."""
        return ()

    def base_identity(self) -> dict[str, str] | None:
        """Return the identity of the base model that training starts from; None if it is unknown.

        It has digests of the `weights`, the `config` and the `generation_config`, and the `transformers` version. The
        `dtype` and a `sample` of the weights identify the same model in another dtype.

        A checkpoint does not contain the base weights. It stores this identity, and loading it on another base model
        warns.
        """
        return None

    @property
    def shares_prompts(self) -> bool:
        """Whether `grouped_log_probs` computes each prompt once for all of its completions."""
        return False

    def grouped_log_probs(
        self,
        prompt: Tokens,
        completions: Tokens,
        prompt_of: Tensor,
        soft_prompt: SoftPrompt | None = None,
        reference: bool = False,
        batch_size: int = 64,
    ) -> LogProbs:
        """Score any number of completions of each prompt; see `log_probs`. Gradients as there.

        Args:
            prompt: U prompts.
            completions: D completions.
            prompt_of: `[D]` int64 index of each completion's prompt.
            soft_prompt: U soft prompts, or None.
            reference: Score under the policy from before training.
            batch_size: Completions per forward pass.

        Returns:
            Per-token log-probabilities `[D, L]`.
        """
        scores = torch.zeros(completions.mask.shape, device=completions.ids.device)
        score = self.reference_log_probs if reference else self.log_probs
        for some in torch.split(torch.arange(len(completions), device=scores.device), batch_size):
            own = soft_prompt.select(prompt_of[some]) if soft_prompt is not None else None
            (found,) = score(prompt.select(prompt_of[some]), [completions.select(some)], own)
            scores[some] = found.tokens
        return LogProbs(scores, completions.mask)

    def merged_for_scoring(self) -> Policy:
        """Return an inference-only policy with the same log-probs; merges adapters if that is faster.

        The returned policy scores under the policy only, not under the reference.
        """
        return self

    @abstractmethod
    def generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, reference: bool = False
    ) -> Tokens:
        """Generate a completion for each prompt.

        Args:
            prompt: B prompts.
            soft_prompt: B soft prompts, or None.
            sampling: Sampling settings.
            reference: Generate with the policy from before training.

        Returns:
            B completions, each up to and including its first end token.
        """
