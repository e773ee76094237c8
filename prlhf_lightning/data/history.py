"""Training pairs, each with some of its user's other training pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from prlhf_lightning.data.collate import pair_tokens
from prlhf_lightning.data.division import Pairs
from prlhf_lightning.data.splits import Positions
from prlhf_lightning.types import PairTokens

USERS_AT_ONCE = 64


class PairsWithHistory(Dataset[dict[str, Any]]):
    """Pairs whose rows have a `history`: from none to `size` other pairs of the same user, drawn at random.

    What is drawn depends on the seed and on which pairs share the batch, hence on the epoch, and on nothing else: a run
    that was interrupted draws what it would have drawn.

    Args:
        pairs: The training pairs; no other pair comes into a history.
        size: Most pairs of a history.
        seed: Seed of the draws.
    """

    def __init__(self, pairs: Pairs, size: int, seed: int) -> None:
        self.pairs, self.size, self.seed = pairs, size, seed
        self._users = pairs.split.users[pairs.positions]
        self._by_user = np.argsort(self._users, kind="stable")
        self._starts = np.searchsorted(self._users[self._by_user], np.arange(len(pairs.split.user_ids) + 1))
        self._place = np.empty_like(self._by_user)
        self._place[self._by_user] = np.arange(len(self._by_user))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once, each with its history."""
        draw = np.random.default_rng([self.seed, *indices])
        histories = [self._others(index, draw) for index in indices]
        rows = iter(self.pairs.__getitems__([*indices, *np.concatenate(histories).tolist()]))
        own = [next(rows) for _ in indices]
        return [row | {"history": [next(rows) for _ in history]} for row, history in zip(own, histories, strict=True)]

    def of_users(self) -> Iterator[tuple[list[str], PairTokens]]:
        """Yield all users, some at a time, each with the same `size` of their pairs in every run (or all they have).

        Returns:
            The users' ids, and their histories `[n, K, L]`.
        """
        users = np.unique(self._users)
        for some in np.split(users, range(USERS_AT_ONCE, len(users), USERS_AT_ONCE)):
            drawn = [self._some(user, np.random.default_rng([self.seed, int(user)])) for user in some]
            rows = iter(self.pairs.__getitems__(np.concatenate(drawn).tolist()))
            ids = [self.pairs.split.user_ids[user] for user in some]
            yield ids, pair_tokens([[next(rows) for _ in places] for places in drawn])

    def _others(self, index: int, draw: np.random.Generator) -> Positions:
        """Draw a history of one pair, in which it is not."""
        start, stop = self._starts[self._users[index] : self._users[index] + 2]
        others = stop - start - 1
        count = int(draw.integers(min(self.size, others), endpoint=True))
        picked = draw.choice(others, count, replace=False)
        found: Positions = self._by_user[start + picked + (picked >= self._place[index] - start)]
        return found

    def _some(self, user: int, draw: np.random.Generator) -> Positions:
        own: Positions = self._by_user[self._starts[user] : self._starts[user + 1]]
        return draw.choice(own, min(self.size, len(own)), replace=False)
