"""Preference pairs made of sampled answers: the best against the worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from prlhf_lightning.data.records import Text
from prlhf_lightning.inference.best_of import Candidates


@dataclass(frozen=True)
class SampledPair:
    """Two answers to one request.

    Attributes:
        chosen: The answer with the highest reward: a string, or a message where the prompt is a conversation.
        rejected: The answer with the lowest reward.
        margin: Difference of their rewards, above 0.
    """

    chosen: Text
    rejected: Text
    margin: float


def pair_of(candidates: Candidates, min_margin: float = 0.0) -> SampledPair | str:
    """Return the best answer against the worst, or why there is no pair.

    An answer that `max_new_tokens` cut off may be rejected, but is never chosen: training on it would teach the model
    to stop there. Answers without a reward do not count.

    Args:
        candidates: The answers to a request and their rewards.
        min_margin: Answers whose rewards differ by this much or less are a tie.
    """
    rewards, answers = candidates.rewards, candidates.answers
    scored = ~rewards.isnan()
    whole = scored & torch.tensor([answer.finish_reason == "stop" for answer in answers])
    if not scored.any():
        return "no answer has a reward"
    if not whole.any():
        return "max_new_tokens cut off every answer"
    best = int(rewards.masked_fill(~whole, -math.inf).argmax())
    worst = int(rewards.masked_fill(~scored, math.inf).argmin())
    if len({answer.text for answer, has_reward in zip(answers, scored, strict=True) if has_reward}) == 1:
        return "all answers are equal"
    if float(rewards[scored].max() - rewards[worst]) <= min_margin:
        return "tie"
    margin = float(rewards[best] - rewards[worst])
    if margin <= min_margin or answers[best].text == answers[worst].text:
        return "max_new_tokens cut off the better answers"
    chosen, rejected = (_completion(candidates.request.prompt, answers[place].text) for place in (best, worst))
    return SampledPair(chosen, rejected, margin)


def _completion(prompt: Text, answer: str) -> Text:
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
