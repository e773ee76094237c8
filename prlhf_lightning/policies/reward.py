"""Reward model as a policy: a causal language model with a scalar head, conditioned on soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.base import Sampling
from prlhf_lightning.policies.causal_lm import CausalLMPolicy
from prlhf_lightning.policies.scoring import end_states, grouped_end_states
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens


class RewardPolicy(CausalLMPolicy):
    """A reward model `r(x, y, u)` (P-RM, arXiv:2402.05133): a causal LM with a scalar head.

    The user is a soft prompt before the prompt, as for a policy that writes. The reward is the head's value of the last
    hidden state at the completion's last token (Ouyang et al. 2022). The head is trained together with the adapters, or
    with all weights; the LM head is not used and stays as it is. Arguments are those of `CausalLMPolicy`.

    `log_probs` and `LogProbs` then hold rewards and not log-probabilities: the reward of a completion stands at its
    last token, and 0 at its other tokens, so that the sum over tokens is the reward. Losses that need more than this
    sum (a reference, an SFT term, a mean per token) have no meaning for it.
    """

    writes: ClassVar[bool] = False

    def build(self, with_reference: bool = True) -> None:
        """Load the weights, add adapters, and create the head.

        Raises:
            ConfigurationError: The model has no LM head apart from its layers, in whose place the reward's head comes.
        """
        super().build(with_reference)
        lm, lm_head = self.lm, self.lm.get_output_embeddings()
        if lm_head is None or lm.base_model is lm:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is a {type(lm).__name__}, which does not give its last hidden states; "
                "use another model."
            )
        # Without gradient: DDP refuses trained weights that have none. Tied weights are trained as embeddings.
        embeddings = {id(param) for param in lm.get_input_embeddings().parameters()}
        for param in lm_head.parameters():
            if id(param) not in embeddings:
                param.requires_grad_(False)
        self.head = RewardHead(lm_head.weight.shape[-1], lm_head.weight.device)

    def _scores(
        self,
        lm: PreTrainedModel,
        before: Sequence[SoftPrompt],
        completions: Sequence[Tokens],
        packed: bool,
        router_losses: list[Tensor] | None,
        temperature: float,
    ) -> tuple[LogProbs, ...]:
        if temperature != 1.0:
            self._refuse("samples no text at a temperature")
        states = end_states(lm, before, completions, self.shortcuts, packed, router_losses)
        rewards = self.head(states).chunk(len(completions))
        return tuple(_at_last_token(part, own) for part, own in zip(completions, rewards, strict=True))

    def grouped_log_probs(
        self,
        prompt: Tokens,
        completions: Tokens,
        prompt_of: Tensor,
        soft_prompt: SoftPrompt | None = None,
        reference: bool = False,
        batch_size: int = 64,
    ) -> LogProbs:
        """Return the rewards of any number of completions of each prompt; see `Policy.grouped_log_probs`."""
        if reference:
            self._refuse("has no reference")
        before = self._segments(self.lm, prompt, soft_prompt)
        self._check_completions(before, completions, prompt_of)
        states = grouped_end_states(self.lm, before, completions, prompt_of, self.shortcuts, batch_size)
        return _at_last_token(completions, self.head(states))

    def reference_log_probs(
        self,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None = None,
        temperature: float = 1.0,
    ) -> tuple[LogProbs, ...]:
        """Raise `ConfigurationError`: before training there is no reward."""
        self._refuse("has no reference")

    def generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, reference: bool = False
    ) -> Tokens:
        """Raise `ConfigurationError`: a reward model writes no text."""
        self._refuse("writes no text")

    def merged_for_scoring(self) -> CausalLMPolicy:
        """Return a copy with merged adapters if the model is small; see `Policy.merged_for_scoring`."""
        merged = super().merged_for_scoring()
        if merged is not self:
            merged.add_module("head", self.head)
        return merged

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigurationError(f"model.policy is a {type(self).__name__}, a reward model: it {what}.")


class RewardHead(nn.Module):
    """Maps hidden states to rewards, in float32; it starts near zero.

    Args:
        width: d, the width of the hidden states.
        device: Device of the weight.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width, dtype=torch.float32, device=device))
        # Hidden states have entries of about 1 after the last norm: rewards start within about 1 / sqrt(d) of 0.
        nn.init.normal_(self.weight, std=1 / (width + 1))

    def forward(self, states: Tensor) -> Tensor:
        """Return the rewards `[N]` float32 of states `[N, d]`."""
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight.float()).squeeze(-1)


def _at_last_token(completions: Tokens, rewards: Tensor) -> LogProbs:
    """Return rewards `[B]` at the completions' last tokens; none where there is no completion."""
    places = torch.arange(completions.mask.shape[1], device=rewards.device)
    is_last = places == completions.mask.sum(1, keepdim=True) - 1
    return LogProbs(torch.where(is_last, rewards[:, None], 0.0), completions.mask)
