"""Batches of rows of about the same length, so that little of a batch is padding, and none over a token budget.

The rows of an epoch, in their random order, are looked at in windows of `WINDOW` batches. Within a window they are
sorted by length (a run of one user's pairs moves as one, by its longest row), and the sequence is cut into batches.
The batches are then shuffled, so neither a batch nor its place in the epoch tells more about a row than about how long
the rows of its window are; who meets whom in a batch changes every epoch.

A token budget makes the number of batches depend on the draw, while training must know it in advance. So the number is
that of the fullest of a few epochs; an epoch that needs fewer has its largest batches halved, and one that needs more
is drawn again. All of it is a function of the seed and the epoch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WINDOW = 50
_Array = npt.NDArray[np.int64]


def sort_in_windows(order: _Array, starts: _Array, lengths: _Array, window: int) -> _Array:
    """Sort runs of rows by their longest row, within windows of the order.

    Args:
        order: `[N]` rows in the order in which they were drawn.
        starts: `[R]` where in `order` each run begins.
        lengths: `[N]` the length of each place in `order`.
        window: Places in a window; a run belongs to the one that it begins in.
    """
    longest = np.maximum.reduceat(lengths, starts)
    new_place = np.empty_like(starts)
    new_place[np.lexsort((longest, starts // window))] = np.arange(len(starts))
    sizes = np.diff(starts, append=len(order))
    return order[np.argsort(np.repeat(new_place, sizes), kind="stable")]


def cut(lengths: _Array, rows: int, budget: int | None, processes: int) -> _Array:
    """Return where the steps of a sequence of rows begin.

    A step is one batch on each of the processes, over which its rows are dealt out evenly.

    Args:
        lengths: `[N]` tokens of each row, in sequence.
        rows: Most rows in a batch.
        budget: Most tokens in a batch, its padding included: rows times the longest. A longer row stands alone.
        processes: Number of batches in a step.
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
    """Halve the largest steps until there are `count`; None where that leaves one with fewer than `least` rows."""
    while (missing := count - len(starts)) > 0:
        sizes = np.diff(starts, append=total)
        largest = np.argsort(-sizes, kind="stable")[:missing]
        if sizes[largest].min() < 2 * least:
            return None
        starts = np.sort(np.concatenate([starts, starts[largest] + sizes[largest] // 2]))
    return starts if missing == 0 else None
