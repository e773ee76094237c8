r"""Heads of reward models side by side on the same features: this package's, LoRe's and PAL's; accuracy and CPU time.

    python benchmarks/reward_heads.py --backbone MiniLM --train train.jsonl.gz --validation validation.jsonl.gz

Files have the columns `user_id`, `prompt`, `chosen` and `rejected`. Plain versions of the heads of two papers are
trained by Adam on the logistic loss of all pairs at once:

- LoRe (arXiv:2504.14439): `r(t, u) = softmax(w_u) · V φ_t`, optionally with each row of `V` pulled to a head that was
  trained without users.
- PAL-A (arXiv:2406.08469): `r(t, u) = -|f(φ_t) - softmax(w_u) P|²`, with prototypes `P` and a perceptron `f` of two
  layers.

They get the vectors of texts, and LoRe also all features of this package, with parts for prompts and texts. Scores are
of distinct texts, not of pairs, which makes steps cheaper than those of the papers' code. "Best" is the highest
accuracy at any of the steps looked at, on the very pairs that are reported: an upper bound of early stopping. Gains are
in points over a model without users, means over people with 1.96 standard errors.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from reporting import about
from reward_models import fit, gain, margins, read, scores
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf_lightning.data import FileSource
from prlhf_lightning.rewards import RewardBackbone, TextFeatures
from prlhf_lightning.training import RewardDataModule
from prlhf_lightning.user_models import LowRankUserModel, UniformUserModel

_LOOKS = 25  # steps between two looks at the validation pairs


class LoRe(nn.Module):
    """A basis of K rewards, and a user's shares of them."""

    def __init__(self, features: TextFeatures, users: int, count: int, pull: float, shared: Tensor) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(features.size, count) / features.size**0.5 + (pull > 0) * shared)
        self.weights = nn.Parameter(torch.randn(users, count))
        self.pull, self.shared = pull, shared

    def forward(self, features: TextFeatures) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function of users and texts `[N]` that gives rewards `[N]`."""
        rewards, shares = features.scores(self.basis), self.weights.softmax(1)
        return lambda users, texts: (shares[users] * rewards[texts]).sum(1)

    def penalty(self) -> Tensor:
        """Return the distance of the basis from the head without users."""
        return self.pull * (self.basis - self.shared).square().sum()


class PAL(nn.Module):
    """A space of texts, K prototypes in it, and a user's shares of them."""

    def __init__(self, features: TextFeatures, users: int, count: int) -> None:
        super().__init__()
        width = features.vectors.shape[1]
        self.map = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.prototypes = nn.Parameter(torch.randn(count, width) / width**0.5)
        self.weights = nn.Parameter(torch.randn(users, count))

    def forward(self, features: TextFeatures) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function of users and texts `[N]` that gives rewards `[N]`."""
        points, shares = self.map(features.vectors), self.weights.softmax(1)
        products, lengths = points @ self.prototypes.T, points.square().sum(1)  # |ideal|² is the same in both texts
        return lambda users, texts: 2 * (shares[users] * products[texts]).sum(1) - lengths[texts]

    def penalty(self) -> Tensor:
        """Return 0."""
        return self.prototypes.new_zeros(())


def train(
    head: LoRe | PAL, features: TextFeatures, pairs: tuple[Tensor, Tensor, Tensor], rate: float, steps: int
) -> Iterator[int]:
    """Train a head by Adam on all pairs; yield after each `_LOOKS` steps."""
    users, chosen, rejected = pairs
    counts = torch.bincount(users).float()
    weights = 1 / (counts[users] * len(counts.nonzero()))  # each user counts once, as in LoRe
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    for step in range(1, steps + 1):
        reward = head(features)
        loss = -(weights * F.logsigmoid(reward(users, chosen) - reward(users, rejected))).sum()
        optimizer.zero_grad()
        (loss + head.penalty()).backward()
        optimizer.step()
        if step % _LOOKS == 0:
            yield step


def vectors_only(features: TextFeatures) -> TextFeatures:
    """Return features without parts for prompts and texts."""
    none = torch.zeros_like(features.prompt)
    return replace(features, prompt=none, text=none, prompts=0, texts=0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("backbone", "train", "validation"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03])
    parser.add_argument("--pulls", type=float, nargs="+", default=[0.0, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--pal_rates", type=float, nargs="+", default=[0.003, 0.03])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(about(), flush=True)
    backbone = RewardBackbone(given.backbone)
    data = RewardDataModule(FileSource(given.train, given.validation), backbone.tokenizer, ties="drop")
    held_out = read(given.validation, backbone.tokenizer)
    print("| head | features | settings | accuracy | best | gain over no users | CPU s |", flush=True)
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    none = fit(UniformUserModel(num_tokens=1), backbone, data, given.seed)  # embeds the texts, too
    alone = scores(margins(none, held_out))
    print(f"| without users | all | closed form | {alone.mean():.4f} | | | |", flush=True)
    for rank in given.ranks:
        begun = time.process_time()
        model = fit(LowRankUserModel(num_tokens=1, rank=rank), backbone, data, given.seed)
        seconds = time.process_time() - begun
        own = scores(margins(model, held_out))
        tell("this package", "all", f"rank {rank}", own.mean(), None, gain(own, alone, held_out.user_ids), seconds)
    pairs = data.training_pairs()
    users = none.rows_of(pairs.user_ids), none.rows_of(held_out.user_ids)
    train_pairs = (users[0], pairs.chosen, pairs.rejected)
    maps = {"all": lambda features: features, "vectors": vectors_only}
    train_features, test_features = (none.features_of(one.texts) for one in (pairs, held_out))
    shared = none.heads(torch.zeros(1, dtype=torch.long)).detach().T
    for kind, name, rank, rate, pull in _settings(given):
        features, tested = (maps[kind](one) for one in (train_features, test_features))
        torch.manual_seed(given.seed)
        count = len(none.vocabulary or ())
        head: LoRe | PAL = (
            LoRe(features, count, rank, pull, shared[: features.size]) if name == "LoRe" else PAL(features, count, rank)
        )
        found, seconds = [], 0.0
        begun = time.process_time()
        for _ in train(head, features, train_pairs, rate, given.steps):
            seconds += time.process_time() - begun
            with torch.no_grad():
                reward = head(tested)
                own = scores(reward(users[1], held_out.chosen) - reward(users[1], held_out.rejected))
            found.append(float(own.mean()))
            begun = time.process_time()
        settings = f"K {rank}, rate {rate:g}, {given.steps} steps" + (f", pull {pull:g}" if pull else "")
        tell(name, kind, settings, found[-1], max(found), gain(own, alone, held_out.user_ids), seconds)


def _settings(given: argparse.Namespace) -> Iterator[tuple[str, str, int, float, float]]:
    for rank in given.ranks:
        for rate in given.rates:
            yield "vectors", "LoRe", rank, rate, 0.0
            yield from (("all", "LoRe", rank, rate, pull) for pull in given.pulls)
        for rate in given.pal_rates:
            yield "vectors", "PAL", rank, rate, 0.0


def tell(
    name: str, kind: str, settings: str, accuracy: float, best: float | None, more: tuple[float, float], seconds: float
) -> None:
    """Print a row of the table."""
    top = "" if best is None else f"{best:.4f}"
    row = (name, kind, settings, f"{accuracy:.4f}", top, f"{more[0]:+.1f} ± {more[1]:.1f}", f"{seconds:.1f}")
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
