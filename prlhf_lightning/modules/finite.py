"""Stops training before an optimiser step on a loss or a gradient that is not finite, and says which rows it came from.

Such a step would make every weight NaN. The check is one read of one number an optimiser step: the norm of the
gradients, which clipping needs anyhow, plus the losses. On a GPU the read waits for the backward pass. That can't be
put off to the next step, for by then the weights are lost, and it costs little: user tables with sparse gradients wait
at the same place, to count their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prlhf_lightning.errors import NonFiniteError
from prlhf_lightning.types import PreferenceBatch

_NAMED = 3  # rows


class FiniteGuard:
    """Looks at the batches of each optimiser step before it is taken."""

    def __init__(self) -> None:
        self._seen: list[tuple[PreferenceBatch, Tensor]] = []

    def watch(self, batch: PreferenceBatch, losses: Tensor) -> None:
        """Take note of a batch of the coming step.

        Args:
            batch: B pairs.
            losses: `[B]` their losses.
        """
        self._seen.append((batch, losses.detach()))

    def is_finite(self, norm: Tensor | None, mean: Callable[[Tensor], Tensor]) -> bool:
        """Return whether the losses since the last step, and the gradients, are finite on every process.

        Args:
            norm: `[]` norm of all gradients, or None to look at the losses only.
            mean: Returns the mean of a number over all processes, which all must call.
        """
        parts = [losses.sum() for _, losses in self._seen] + ([norm] if norm is not None else [])
        # A sum is finite only where all that it is made of is.
        return not parts or bool(mean(torch.stack([part.float() for part in parts]).sum()).isfinite())

    def of_losses(self) -> list[tuple[int, str]]:
        """Return record and user of this process's rows whose loss is not finite."""
        return [
            (int(batch.records[row]), batch.user_ids[row])
            for batch, losses in self._seen
            for row in (~losses.isfinite()).nonzero().flatten().tolist()
        ]

    def of_gradients(
        self, losses_of: Callable[[PreferenceBatch], Tensor], params: Sequence[nn.Parameter]
    ) -> list[tuple[int, str]]:
        """Return record and user of this process's rows whose gradient is not finite.

        Args:
            losses_of: Computes the losses `[B]` of a batch anew, which is done row by row.
            params: What is trained.
        """
        return [
            (int(row.records[0]), row.user_ids[0])
            for batch, _ in self._seen
            for row in _rows(batch)
            if not _has_finite_gradients(losses_of(row), params)
        ]

    def forget(self) -> None:
        """Begin a new step."""
        self._seen = []


def all_finite(params: Iterable[nn.Parameter]) -> bool:
    """Return whether all weights, or this process's parts of them, are finite."""
    return all(bool(_local(param).isfinite().all()) for param in params)


def non_finite_error(step: int, rows: Sequence[str] | None, advice: Sequence[str]) -> NonFiniteError:
    """Return what stops training.

    Args:
        step: Number of steps that were taken before.
        rows: The offending rows, each with its place and user; None if the weights themselves are not finite.
        advice: What to try, in order.
    """
    tried = "; ".join(advice)
    if rows is None:
        return NonFiniteError(
            f"The weights became infinite or NaN in step {step}, by a gradient that was finite. Go on from an earlier "
            f"checkpoint, and: {tried}."
        )
    named = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    culprit = f"from {named}" if rows else "from no single row, but from all of its batch together"
    return NonFiniteError(
        f"Loss or gradient became infinite or NaN after step {step}, {culprit}. That step was not taken. Look at the "
        f"rows if they are always the same. Otherwise: {tried}. If it happens at once when you go on from here, take "
        "an earlier checkpoint."
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(batch: PreferenceBatch) -> Iterator[PreferenceBatch]:
    for row, user_id in enumerate(batch.user_ids):
        part = batch.select(torch.tensor([row], device=batch.records.device))
        yield replace(part, user_ids=(user_id,), reference_keys=())


def _has_finite_gradients(losses: Tensor, params: Sequence[nn.Parameter]) -> bool:
    # Not `backward`, which would add to the gradients, and have DDP wait for the other processes.
    grads = torch.autograd.grad(losses.sum(), params, allow_unused=True)
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
    return all(bool(value.isfinite().all()) for value in values)
