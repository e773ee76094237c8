r"""Reward models with up to a million users: CPU time of a step, of a fit, and peak memory, on synthetic features.

    python benchmarks/reward_scale.py --users 10000 100000 1000000 --pairs 4000000

The number of pairs is the same for every number of users. Each number runs in a process of its own. Times are CPU
seconds. A fit of `LowRankUserModel` with a given `precision` has 100 steps on all pairs; before every tenth, and at its
end, it estimates all codes. "Step" is one of the first kind, "codes" one estimate of all codes and their covariances,
of two passes. "AdamW" is a step of 512 pairs of the gradient descent that other user models and losses use.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from itertools import pairwise
from multiprocessing import get_context

import torch
from reporting import about

from prlhf_lightning.rewards import RewardBackbone, RewardModel, TextFeatures, fit_codes, fit_head
from prlhf_lightning.rewards.fitting import IndexedPairs
from prlhf_lightning.training import RowwiseAdamW
from prlhf_lightning.user_models import LowRankUserModel

_STEPS = 10  # of a fit, which has one estimate of the codes before them


def synthetic(users: int, pairs: int, texts: int, width: int) -> tuple[TextFeatures, IndexedPairs]:
    """Return random features of texts and random pairs."""
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(texts, width), dim=1)
    none = torch.zeros(texts, dtype=torch.long)
    chosen = torch.randint(texts, (pairs,))
    rejected = (chosen + torch.randint(1, texts, (pairs,))) % texts
    whose = 1 + torch.arange(pairs) % users
    return TextFeatures(vectors, none, none, 0, 0), IndexedPairs(whose, chosen, rejected, torch.ones(pairs))


def gradient_steps(features: TextFeatures, pairs: IndexedPairs, users: int, rank: int) -> float:
    """Return the median CPU seconds of a step of AdamW on 512 pairs."""
    model = RewardModel(LowRankUserModel(num_tokens=1, rank=rank), RewardBackbone("builtin:style-lm"))
    model.user_model.build(1 + users, features.vectors[:64])
    optimizer = RowwiseAdamW(model.user_model.parameters(), lr=1e-2, weight_decay=0.0)
    seconds = []
    for _ in range(30):
        begun = time.process_time()
        part = torch.randint(len(pairs), (512,))
        whose, chosen, rejected = pairs.users[part], pairs.chosen[part], pairs.rejected[part]
        margins = (model.heads(whose) * (features.dense(chosen) - features.dense(rejected))).sum(1)
        optimizer.zero_grad()
        torch.nn.functional.softplus(-margins).mean().backward()
        optimizer.step()
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds)


def measure(users: int, pairs: int, texts: int, width: int, rank: int) -> str:
    """Return a row of the table."""
    torch.set_num_threads(1)
    features, judged = synthetic(users, pairs, texts, width)
    adamw = gradient_steps(features, judged, users, rank)
    ends: list[float] = []
    begun = time.process_time()
    fit_head(features, judged, 1 + users, rank, 100.0, steps=_STEPS, report=lambda _: ends.append(time.process_time()))
    step = statistics.median(after - before for before, after in pairwise(ends))
    whole = time.process_time() - begun
    slopes, generic = torch.randn(pairs, rank), torch.zeros(pairs)
    codes, covariances = torch.zeros(1 + users, rank), torch.eye(rank).expand(1 + users, -1, -1).contiguous()
    begun = time.process_time()
    fit_codes(generic, slopes, judged, codes, covariances, 2)
    estimate = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    fit = 100 * step + 10 * estimate + (whole - _STEPS * step - estimate)
    cells = (f"{users:,}", f"{1000 * adamw:.1f} ms", f"{step:.2f}", f"{estimate:.1f}", f"{fit:.0f}", f"{peak:.1f} GB")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=4_000_000)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    print(about())
    print("| users | AdamW, 512 pairs | step | codes | a fit, from these | peak memory |")
    print("|---:|---:|---:|---:|---:|---:|", flush=True)
    for users in given.users:
        with get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (users, given.pairs, given.texts, given.width, given.rank)), flush=True)


if __name__ == "__main__":
    main()
