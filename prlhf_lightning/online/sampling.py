"""Sampling of answers in training: many users in one batch, several answers to each prompt.

P prompts with n answers each, so B = P n answers in the order of the prompts; L tokens; V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference.kv_cache import make_kv_cache
from prlhf_lightning.policies import CausalLMPolicy, Sampling
from prlhf_lightning.policies.loading import unused_ids
from prlhf_lightning.policies.scoring import segments
from prlhf_lightning.policies.sequences import join
from prlhf_lightning.types import SoftPrompt, Tokens
from prlhf_lightning.utils.modes import eval_mode

#: Rows leave the batch once this share of it has ended: moving the cache costs about as much as a step.
_ENDED = 0.25


@dataclass(frozen=True)
class Answers:
    """Sampled answers.

    Attributes:
        tokens: B answers, each up to and including its first end token.
        log_probs: `[B, L]` float32 log-probability of each token under the distribution that it was drawn from, at the
            sampling temperature; 0 on padding.
        truncated: `[B]` bool, true for answers without an end token.
    """

    tokens: Tokens
    log_probs: Tensor
    truncated: Tensor


class Sampler:
    """Samples answers from a policy.

    Args:
        policy: The policy, which must be built. Its adapters are active.
        rows: Most answers that are generated at the same time.

    Raises:
        ConfigurationError: The policy is no Hugging Face model.
    """

    def __init__(self, policy: CausalLMPolicy, rows: int = 256) -> None:
        if not isinstance(policy, CausalLMPolicy) or not policy.writes:
            raise ConfigurationError(
                f"model.policy is a {type(policy).__name__}; answers are sampled from a CausalLMPolicy only."
            )
        self._policy, self._rows = policy, rows
        with eval_mode(policy):
            self._new_cache = make_kv_cache(policy.lm)
        self._unused = torch.tensor(unused_ids(policy.tokenizer, policy.lm), dtype=torch.long)

    @torch.no_grad()
    def sample(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Answers:
        """Return n answers to each of P prompts, each prompt under its own soft prompt.

        An answer depends on its seed and, by float rounding only, on the other rows.

        Args:
            prompt: P prompts.
            soft_prompt: P soft prompts, or None.
            sampling: Sampling settings, with `top_p: 1`.
            seeds: For each prompt n seeds, at least 0 and below 2**63.

        Raises:
            ConfigurationError: Prompt and answer may be longer than the model allows, or `top_p` is below 1, under
                which the trained distribution would not be the sampled one.
        """
        if sampling.top_p < 1:
            raise ConfigurationError(
                f"model.sampling.top_p is {sampling.top_p}; answers of a policy gradient are sampled from the whole "
                "distribution, whose log-probabilities the loss uses: set it to 1."
            )
        copies = len(seeds[0])
        parts = torch.split(torch.arange(len(prompt), device=prompt.ids.device), max(1, self._rows // copies))
        answers = []
        with eval_mode(self._policy):
            for rows in parts:
                some = soft_prompt.select(rows) if soft_prompt is not None else None
                chances = _chances([seed for row in rows.tolist() for seed in seeds[row]], sampling)
                answers.append(self._generate(prompt.select(rows), some, sampling, copies, chances))
        pad = torch.nn.functional.pad
        width = max(part.log_probs.shape[1] for part in answers)
        return Answers(
            Tokens.concat([part.tokens for part in answers]),
            torch.cat([pad(part.log_probs, (0, width - part.log_probs.shape[1])) for part in answers]),
            torch.cat([part.truncated for part in answers]),
        )

    def _generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, copies: int, chances: Tensor
    ) -> Answers:
        policy = self._policy
        sequences = join(segments(policy.lm, policy.tokenizer.bos_token_id, prompt, soft_prompt), align="right")
        self._check_length(sequences.mask.shape[1], sampling.max_new_tokens)
        cache = self._new_cache()
        logits = cache.append(sequences, [row for row in range(len(prompt)) for _ in range(copies)])
        device, count = logits.device, len(logits)
        ends, unused = torch.tensor(policy.end_token_ids, device=device), self._unused.to(device)
        ids = torch.zeros(count, sampling.max_new_tokens, dtype=torch.long, device=device)
        log_probs = torch.zeros(ids.shape, device=device)
        lengths = torch.full((count,), sampling.max_new_tokens, device=device)
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        running = torch.arange(count, device=device)  # the row of each row of the cache
        for step in range(sampling.max_new_tokens):
            tokens, scores = _draw(logits, unused, sampling.temperature, chances[step].to(device)[running])
            ids[running, step], log_probs[running, step] = tokens, scores
            stops = torch.isin(tokens, ends) & ~ended[running]
            lengths[running[stops]] = step + 1
            ended[running[stops]] = True
            over = ended[running]
            if bool(over.all()) or step + 1 == sampling.max_new_tokens:
                break
            if float(over.float().mean()) >= _ENDED:
                cache.keep((~over).nonzero()[:, 0].tolist())
                running, tokens = running[~over], tokens[~over]
            logits = cache.advance(tokens)
        width = int(lengths.max())
        mask = torch.arange(width, device=device) < lengths[:, None]
        return Answers(Tokens(ids[:, :width] * mask, mask), log_probs[:, :width] * mask, ~ended)

    def _check_length(self, before: int, new: int) -> None:
        limit = self._policy.max_positions
        if limit is not None and before + new > limit:
            raise ConfigurationError(
                f"model.sampling.max_new_tokens is {new}, and soft prompt, user text and prompt take up to {before} of "
                f"the {limit} positions of {self._policy.name!r}; lower it, or data.max_prompt_length."
            )


def _chances(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """Return a number in [0, 1) for each token of each seed's answer, `[max_new_tokens, B]` float64."""
    if sampling.temperature == 0:
        return torch.zeros(sampling.max_new_tokens, len(seeds))
    generator, drawn = torch.Generator(), []
    for seed in seeds:
        generator.manual_seed(seed)
        drawn.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(drawn, dim=1)


def _draw(logits: Tensor, unused: Tensor, temperature: float, chances: Tensor) -> tuple[Tensor, Tensor]:
    """Return a token for each of B rows, `[B]`, and its log-probability, `[B]` float32.

    Args:
        logits: `[B, V]` float32.
        unused: `[n]` ids that are never drawn.
        temperature: Sampling temperature; 0 takes the likeliest token.
        chances: `[B]` numbers in [0, 1).
    """
    if len(unused):
        logits = logits.index_fill(1, unused, -torch.inf)
    log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # In float64: the rounding of a float32 sum over a large vocabulary would change the distribution.
        reached = log_probs.double().exp().cumsum(-1)
        target = chances[:, None] * reached[:, -1:]
        tokens = torch.searchsorted(reached, target, right=True)[:, 0]
        likeliest = logits.argmax(-1)  # for a sum that rounding keeps below the target, and for NaN
        tokens = torch.where(tokens < logits.shape[1], tokens, likeliest)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0].float()
