"""What every policy is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens
from prlhf_lightning.utils.chat_tokens import end_token_ids


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Tokens to write at most.
        temperature: Sampling temperature; 0 picks the likeliest token each time.
        top_p: Share of the probability to sample from.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what nothing can be drawn with."""
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"sampling.max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(
                f"sampling.temperature is {self.temperature}; it must be 0 (the likeliest token each time) or more."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"sampling.top_p is {self.top_p}; it must be above 0, and 1 at most.")


class Policy(nn.Module, ABC):
    """A language model that can be conditioned on soft-prompt vectors: `pi(y | x, u)` of arXiv:2402.05133.

    Sequences are `[BOS] [soft prompt] [prompt] [completion]`; the soft prompt stands after BOS where the prompt
    has one. `build` loads the weights, so that constructing a policy and reading its tokenizer are cheap.
    """

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the data must be encoded with."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; see `prlhf_lightning.utils.chat_tokens`."""
        return end_token_ids(self.tokenizer)

    @abstractmethod
    def build(self, with_reference: bool = True) -> None:
        """Load or create the weights.

        Args:
            with_reference: Whether `reference_log_probs` will be called.
        """

    def prepare_for_sharding(self) -> list[nn.Module]:
        """Get ready to be divided among processes, and return the parts to gather one by one, such as layers.

        From then on every process must call the parts equally often in each method, whatever its rows.
        """
        return []

    @property
    def max_positions(self) -> int | None:
        """Most vectors and tokens that a sequence may have once the policy is built; None for no limit."""
        return None

    @abstractmethod
    def token_embeddings(self) -> Tensor:
        """Return the input embeddings of words spread over the vocabulary, `[n, d]`, for soft prompts to start at."""

    @abstractmethod
    def embed(self, tokens: Tokens, reference: bool = False) -> SoftPrompt:
        """Return the input embeddings of tokens as vectors, `[B, L, d]`.

        Args:
            tokens: B texts.
            reference: Take the embeddings as they were before training.
        """

    @abstractmethod
    def log_probs(
        self, prompt: Tokens, completions: Sequence[Tokens], soft_prompt: SoftPrompt | None = None
    ) -> tuple[LogProbs, ...]:
        """Score several completions of the same prompts.

        Args:
            prompt: B prompts.
            completions: One or more batches of B completions of those prompts.
            soft_prompt: B soft prompts, or None for none.

        Returns:
            For each batch of completions, its per-token log-probabilities `[B, L]`, differentiable.
        """

    @abstractmethod
    def reference_log_probs(
        self, prompt: Tokens, completions: Sequence[Tokens], soft_prompt: SoftPrompt | None = None
    ) -> tuple[LogProbs, ...]:
        """Score completions as `log_probs` does, under the policy as it was before training, without gradient."""

    def reference_identity(self) -> dict[str, str] | None:
        """Return what decides the reference's log-probs: its weights and how they are computed with.

        The log-probs are kept on disk under it. None, for a policy that cannot tell, keeps nothing.
        """
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return what the policy itself adds to the loss of the last `log_probs`, `[]`, and forget it.

        None, for a policy that adds nothing.
        """
        return None

    def training_notes(self) -> Sequence[str]:
        """Return what to tell once when the policy, which has been built, begins to be trained."""
        return ()

    def base_identity(self) -> dict[str, str] | None:
        """Return what tells the model that training starts from.

        These are digests of the `weights`, the `config` and the `generation_config`, the `transformers` version, and,
        to know the same model in another dtype, `dtype` and a `sample` of the weights.

        A checkpoint, which does not hold these weights, notes it, and warns where it is put on others. None, for a
        policy that cannot tell.
        """
        return None

    def grouped_log_probs(
        self,
        prompt: Tokens,
        completions: Tokens,
        prompt_of: Tensor,
        soft_prompt: SoftPrompt | None = None,
        reference: bool = False,
        batch_size: int = 64,
    ) -> LogProbs:
        """Score any number of completions of each prompt, without gradient; see `log_probs`.

        Args:
            prompt: U prompts.
            completions: D completions.
            prompt_of: `[D]` each one's prompt.
            soft_prompt: U soft prompts, or None for none.
            reference: Score as the policy did before training.
            batch_size: Completions in a pass.

        Returns:
            Per-token log-probabilities `[D, L]`.
        """
        scores = torch.zeros(completions.mask.shape, device=completions.ids.device)
        score = self.reference_log_probs if reference else self.log_probs
        with torch.no_grad():
            for some in torch.split(torch.arange(len(completions), device=scores.device), batch_size):
                own = soft_prompt.select(prompt_of[some]) if soft_prompt is not None else None
                (found,) = score(prompt.select(prompt_of[some]), [completions.select(some)], own)
                scores[some] = found.tokens
        return LogProbs(scores, completions.mask)

    def settled(self) -> Policy:
        """Return a policy that gives the same log-probs, for while this one is not trained; quicker where it can be.

        It may be asked for log-probs under the policy only, not for those of the reference.
        """
        return self

    @abstractmethod
    def generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, reference: bool = False
    ) -> Tokens:
        """Write a completion for each prompt.

        Args:
            prompt: B prompts.
            soft_prompt: B soft prompts, or None for none.
            sampling: How to draw.
            reference: Write as the policy did before training.

        Returns:
            The completions, up to the first token that ends one, which is included.
        """
