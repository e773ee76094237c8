"""What a model writes for a few prompts, measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prlhf_lightning.metrics import repeated_ngrams
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.policies import Sampling
from prlhf_lightning.types import PreferenceBatch, Tokens

_ROOM = 3  # an answer may be so many times as long as the longest chosen one before it is cut off


@torch.no_grad()
def measure(module: PersonalizedLM, batch: PreferenceBatch, most: int) -> dict[str, float]:
    """Write an answer to each prompt of a batch, always taking the likeliest token, and return what it is like.

    Args:
        module: A model in evaluation mode.
        batch: B pairs.
        most: Tokens of an answer at most.

    Returns:
        Without it being possible to write a token, nothing. Else `generated_length_ratio` to the chosen completions,
        both cut at the same number of tokens, `generated_repetition`, `chosen_repetition` and `generated_empty`; and,
        where there is a reference, by how much likelier a token has become: `generated_log_ratio` of what is written
        (an estimate of the divergence from the reference) and `chosen_log_ratio` of what was chosen.
    """
    soft_prompt = module.user_model(module.users(batch.user_ids, batch.user_text))
    most = min(most, _ROOM * batch.chosen.ids.shape[1])
    if module.policy.max_positions is not None:
        most = min(most, module.policy.max_positions - soft_prompt.vectors.shape[1] - batch.prompt.ids.shape[1])
    if most < 1:
        return {}
    written = module.policy.generate(batch.prompt, soft_prompt, Sampling(max_new_tokens=most, temperature=0.0))
    special = set(module.policy.tokenizer.all_special_ids)
    answers, chosen = _rows(written), _rows(batch.chosen)
    values = {
        "generated_length_ratio": _mean_length(answers, most) / _mean_length(chosen, most),
        "generated_repetition": _mean([repeated_ngrams(answer) for answer in answers]),
        "chosen_repetition": _mean([repeated_ngrams(answer) for answer in chosen]),
        "generated_empty": _mean([float(special.issuperset(answer)) for answer in answers]),
    }
    if module.loss.requires_reference:
        visible = module.user_model.reference(module.users(batch.user_ids, batch.user_text, reference=True))
        texts = [written, batch.chosen]
        now = module.policy.log_probs(batch.prompt, texts, soft_prompt)
        before = module.policy.reference_log_probs(batch.prompt, texts, visible)
        ratios: list[Tensor] = [(a.mean - b.mean).mean() for a, b in zip(now, before, strict=True)]
        values |= {"generated_log_ratio": ratios[0].item(), "chosen_log_ratio": ratios[1].item()}
    return values


def _rows(tokens: Tokens) -> list[list[int]]:
    return [ids.tolist() for ids in tokens.unpadded()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_length(rows: Sequence[Sequence[int]], most: int) -> float:
    return _mean([min(len(row), most) for row in rows])
