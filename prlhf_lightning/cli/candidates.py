"""What `generate` and `make-pairs` report about sampled answers and their users."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from torch import Tensor

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.inference.best_of import expected_best, kl_bound, length_correlation
from prlhf_lightning.utils.terminal import printable

_LISTED = 5


def report_unknown(
    vocabulary: UserVocabulary, users: Iterable[str | Mapping[str, float] | None], model: str | None = None
) -> None:
    """Print the users whom a model does not know, for whom the generic user stands in.

    Args:
        vocabulary: The model's users.
        users: Users and blends of requests.
        model: Name of the model, if it is not the one that writes.
    """
    given = [user for user in users if user is not None]
    named = dict.fromkeys(name for user in given for name in ([user] if isinstance(user, str) else user))
    if unknown := [printable(name) for name in named if name not in vocabulary]:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        what = f"Users unknown to {model}, whose" if model else "Unknown users, who"
        get = "answers are scored for the generic user" if model else "get the generic user's answer"
        sys.stderr.write(f"{what} {get}: {', '.join(unknown[:_LISTED])}{more}\n")


def finite(value: Tensor) -> float | None:
    """Return a number for JSON, None for NaN."""
    number = float(value)
    return number if math.isfinite(number) else None


def described(rewards: Sequence[Tensor], lengths: Sequence[Tensor]) -> str:
    """Return what the rewards of answers tell, in one line: their mean, that of the best, and the role of length.

    Args:
        rewards: `[n]` rewards of the answers to each request; NaN for an answer without one.
        lengths: `[n]` their numbers of tokens.
    """
    scored = [one[~one.isnan()] for one in rewards]
    kept = [expected_best(one) for one in scored if len(one)]
    none = sum(map(len, rewards)) - sum(map(len, scored))
    without = f" Answers without a reward: {none} (blank, or refused by the scorer)." if none else ""
    if not kept:
        return f"No answer has a reward.{without}"
    said = f"Mean reward of an answer: {mean(float(curve[0]) for curve in kept):.3f}"
    n = max(map(len, rewards))
    if n == 1:
        return f"{said}.{without}"
    best = f"of the best of {n}: {mean(float(curve[-1]) for curve in kept):.3f}"
    tokens = mean(float(one.double().mean()) for one in lengths)
    places = [int(one.nan_to_num(-math.inf).argmax()) for one in rewards]
    chosen = mean(float(one[place]) for one, place in zip(lengths, places, strict=True))
    correlation = length_correlation(rewards, lengths)
    related = "" if math.isnan(correlation) else f"; correlation of reward and length {correlation:.2f}"
    return (
        f"{said}; {best}, at most {kl_bound(n):.2f} nats from the policy. Tokens: {tokens:.1f}, of the best "
        f"{chosen:.1f}{related}.{without}"
    )
