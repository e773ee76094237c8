"""Batch samplers: user-grouped batches for training, sequential batches for evaluation.

The order of an epoch is a pure function of (seed, epoch), so training can resume in the middle of an epoch. It consists
of steps, global batches of `batch_size * world_size` pairs, and each rank takes its slice. The number of processes
does not change the pairs of a step of the same global size (except with a token budget, which is per process).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from prlhf_lightning.errors import ConfigurationError

_Array = npt.NDArray[np.int64]


class UserGroupedBatchSampler(Sampler[list[int]]):
    """Yields batches of positions for training, reshuffled every epoch.

    The length of an epoch is the number of pairs. With `balance=0` it has each pair once. With `balance=b` the share of
    a user with n pairs is proportional to `n ** (1 - b)`; at 1, all users have the same share. A user whose share
    exceeds their pairs repeats them, reshuffled each time. A user with a smaller share gets a new random subset each
    epoch, so no pair is always left out. Shares are rounded at random, without bias.

    All ranks have the same number of batches. One global batch may be smaller; its pairs are distributed evenly over
    the ranks. If it has fewer pairs than ranks, each rank without a pair gets one of the epoch's first pairs.

    Args:
        users: `[N]` any integer that identifies the user of each pair.
        batch_size: Pairs per batch and process.
        pairs_per_user: Most pairs of one user placed together. (The edge of a batch may cut such a run.)
        balance: From 0 (all pairs have equal weight) to 1 (all users have equal weight).
        seed: Seed of the order.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel processes.
        lengths: `[N]` tokens of each pair; if given, pairs of similar length share a batch (see `sort_in_windows`).
        max_tokens: Most tokens per batch and process, padding included: pairs times the longest. Needs `lengths`.
    """

    def __init__(
        self,
        users: npt.NDArray[np.integer],
        batch_size: int,
        pairs_per_user: int = 1,
        balance: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lengths: _Array | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if batch_size < 1 or pairs_per_user < 1:
            raise ConfigurationError(
                f"batch_size ({batch_size}) and pairs_per_user ({pairs_per_user}) must be at least 1."
            )
        if not 0 <= balance <= 1:
            raise ConfigurationError(f"balance is {balance}; it must be between 0 (pairs equal) and 1 (users equal).")
        if max_tokens is not None and (max_tokens < 1 or lengths is None):
            raise ConfigurationError(f"max_tokens is {max_tokens}; it must be at least 1, and needs lengths.")
        self._by_user = np.argsort(users, kind="stable")  # positions, user by user
        self._counts: _Array = np.unique(users, return_counts=True)[1]
        self._batch_size, self._pairs_per_user, self._balance = batch_size, pairs_per_user, balance
        self._lengths, self._max_tokens = lengths, max_tokens
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._epoch, self._start = 0, 0
        self._drawn: tuple[int, list[_Array]] = (-1, [])  # an epoch and its steps
        self._left_out: tuple[int, _Array] = (-1, np.empty(0, dtype=np.int64))

    @property
    def sampler(self) -> UserGroupedBatchSampler:
        """Return self: Lightning looks for `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch to yield next, and its first batch."""
        self._epoch, self._start = epoch, start

    def leave_out(self, epoch: int, done: _Array) -> None:
        """Skip positions `[n]` in an epoch that was started with other settings, each as often as it is listed.

        The epoch keeps its number of batches: its first batches are empty, and `first` returns the first other one.
        """
        self._left_out, self._drawn = (epoch, done), (-1, [])

    def first(self, epoch: int) -> int:
        """Return the index of the first non-empty step of an epoch; the number of steps if all are empty."""
        return next((number for number, step in enumerate(self.steps(epoch)) if len(step)), len(self))

    def __len__(self) -> int:
        """Return the number of batches per epoch, the same on every rank and for every start."""
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        # Read epoch and start now: Lightning may set the next ones before the first batch is drawn.
        return self._batches(self._epoch, self._start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        steps = self.steps(epoch)
        for step in steps[start:]:
            if len(step) < self._world_size:
                step = np.resize(np.concatenate([step, *steps]), self._world_size)
            yield np.array_split(step, self._world_size)[self._rank].tolist()

    def pairs_per_rank(self, epoch: int, steps: slice) -> float:
        """Return the number of pairs in the batches of some steps of an epoch, averaged over the ranks."""
        return sum(max(1.0, len(step) / self._world_size) for step in self.steps(epoch)[steps] if len(step))

    def steps(self, epoch: int) -> list[_Array]:
        """Return the positions of each step of an epoch, for all ranks together."""
        if self._drawn[0] != epoch:
            steps = self._draw_steps(epoch)
            if epoch == self._left_out[0]:
                steps = self._without(steps, self._left_out[1])
            self._drawn = (epoch, steps)
        return self._drawn[1]

    def _without(self, steps: list[_Array], done: _Array) -> list[_Array]:
        """Remove positions `[n]` from the steps of an epoch; empty steps at the start keep their number."""
        order = np.concatenate(steps)
        by_row = np.argsort(order, kind="stable")
        copy = np.empty_like(order)
        copy[by_row] = _ranks(order[by_row])  # 0 at the first occurrence of a row, then 1, ...
        left = copy >= np.bincount(done, minlength=len(self._by_user))[order]
        if self._lengths is None:
            size = self._batch_size * self._world_size
            edges = np.arange(size, left.sum(), size)
        else:  # keep the old batches: mixed lengths would add padding or exceed the token budget
            edges = np.cumsum([part.sum() for part in np.split(left, np.cumsum(list(map(len, steps)))[:-1])])[:-1]
        rest = [step for step in np.split(order[left], edges) if len(step)]
        return [order[:0]] * (len(self) - len(rest)) + rest

    def _draw_steps(self, epoch: int) -> list[_Array]:
        rng = np.random.default_rng([self._seed, epoch])
        order, starts = self._cut(rng)
        if self._lengths is None:
            return np.split(order, starts[1:])
        while (fitted := halve_largest(starts, len(order), len(self), self._world_size)) is None:
            order, starts = self._cut(rng)
        steps = np.split(order, fitted[1:])
        return [steps[number] for number in rng.permutation(len(steps))]

    @cached_property
    def _count(self) -> int:
        if self._max_tokens is None:
            return -(-len(self._by_user) // (self._batch_size * self._world_size))
        return max(len(self._cut(np.random.default_rng([self._seed, epoch]))[1]) for epoch in range(4))

    def _cut(self, rng: np.random.Generator) -> tuple[_Array, _Array]:
        """Draw an epoch; return its positions `[N]` in order and the start of each step."""
        order, runs = self._draw(rng)
        if self._lengths is None:
            return order, cut(order, self._batch_size, None, self._world_size)
        window = WINDOW * self._batch_size * self._world_size
        order = sort_in_windows(order, runs, self._lengths[order], window)
        return order, cut(self._lengths[order], self._batch_size, self._max_tokens, self._world_size)

    def order(self, epoch: int) -> _Array:
        """Return the positions `[N]` of an epoch in batch order."""
        return np.concatenate(self.steps(epoch))

    def _draw(self, rng: np.random.Generator) -> tuple[_Array, _Array]:
        """Draw the positions `[N]` of an epoch, and the start of each run of one user's pairs."""
        total = len(self._by_user)
        if self._balance == 0 and self._pairs_per_user == 1:
            return rng.permutation(total), np.arange(total)
        quotas = self._quotas(rng)
        # Enough passes over each user's pairs; copies of a pair are in different passes.
        passes = -(-quotas // self._counts)
        copies = np.repeat(passes, self._counts)  # of each pair, user by user
        pair = np.repeat(self._by_user, copies)
        user = np.repeat(np.arange(len(quotas)), passes * self._counts)
        pass_number = np.arange(len(pair)) - np.repeat(np.cumsum(copies) - copies, copies)
        pass_id = np.repeat(np.cumsum(passes) - passes, passes * self._counts) + pass_number
        # Shuffle within each pass (the factor 0.5 keeps rounding from reaching the next pass), and keep each user's
        # first pairs up to the quota.
        shuffled = np.argsort(pass_id + 0.5 * rng.random(len(pair)))
        place = _ranks(user[shuffled])
        kept = shuffled[place < quotas[user[shuffled]]]
        # Runs never cross a pass, so no run has the same pair twice.
        run = pass_id[kept] * (self._counts.max() // self._pairs_per_user + 1)
        run = run + _ranks(pass_id[kept]) // self._pairs_per_user
        starts = np.flatnonzero(np.diff(run, prepend=-1))
        lengths = np.diff(starts, append=total)
        new_place = rng.permutation(len(starts))
        grouped: _Array = pair[kept][np.argsort(np.repeat(new_place, lengths), kind="stable")]
        moved = lengths[np.argsort(new_place)]
        return grouped, np.cumsum(moved) - moved

    def _quotas(self, rng: np.random.Generator) -> _Array:
        """Return each user's number of pairs in the epoch, `[U]`; they sum to the number of pairs."""
        if self._balance == 0:
            return self._counts
        weights = self._counts ** (1 - self._balance)
        # Systematic rounding in random order: each quota is the share rounded up or down, and its mean is the share.
        order = rng.permutation(len(weights))
        edges = np.cumsum(weights[order] / weights.sum()) * len(self._by_user)
        edges[-1] = len(self._by_user)
        quotas = np.empty(len(weights), dtype=np.int64)
        quotas[order] = np.diff(np.floor(edges + rng.random()), prepend=0)
        return quotas


class SequentialBatchSampler(Sampler[list[int]]):
    """Yields batches of positions for evaluation: in order, each exactly once over all ranks.

    All ranks have the same number of batches, as sharded models need. So batch sizes may differ by one (at batch size
    1, a batch may have two rows). With fewer rows than ranks, some ranks have one empty batch.

    Args:
        size: Number of rows.
        batch_size: Most rows per batch and process.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        rows = np.arange(size)[rank::world_size]
        batches = max(1, min(-(-size // (batch_size * world_size)), size // world_size))
        self._batches = np.array_split(rows, batches) if size else []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._batches)


def _ranks(groups: _Array) -> _Array:
    """Return the index of each element within its group; groups are contiguous."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


WINDOW = 50


def sort_in_windows(order: _Array, starts: _Array, lengths: _Array, window: int) -> _Array:
    """Sort runs of rows by their longest row, within windows of the order.

    Args:
        order: `[N]` rows in drawn order.
        starts: `[R]` start of each run in `order`.
        lengths: `[N]` length of each row in `order`.
        window: Rows per window; a run belongs to the window of its first row.
    """
    longest = np.maximum.reduceat(lengths, starts)
    new_place = np.empty_like(starts)
    new_place[np.lexsort((longest, starts // window))] = np.arange(len(starts))
    sizes = np.diff(starts, append=len(order))
    return order[np.argsort(np.repeat(new_place, sizes), kind="stable")]


def cut(lengths: _Array, rows: int, budget: int | None, processes: int) -> _Array:
    """Return the start of each step in a sequence of rows.

    A step is one batch per process; its rows are distributed evenly over the processes.

    Args:
        lengths: `[N]` tokens of each row, in order.
        rows: Most rows in a batch.
        budget: Most tokens in a batch, padding included: rows times the longest. A longer row gets its own batch.
        processes: Number of batches per step.
    """
    if budget is None:
        return np.arange(0, len(lengths), rows * processes)
    starts, first, longest = [0], 0, 0
    for place, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if place - first + 1 > processes * max(1, min(rows, budget // max(1, longest))):
            starts.append(place)
            first, longest = place, length
    return np.array(starts, dtype=np.int64)


def halve_largest(starts: _Array, total: int, count: int, least: int) -> _Array | None:
    """Halve the largest steps until there are `count`; None if a step would get fewer than `least` rows."""
    while (missing := count - len(starts)) > 0:
        sizes = np.diff(starts, append=total)
        largest = np.argsort(-sizes, kind="stable")[:missing]
        if sizes[largest].min() < 2 * least:
            return None
        starts = np.sort(np.concatenate([starts, starts[largest] + sizes[largest] // 2]))
    return starts if missing == 0 else None
