"""Checks for non-finite losses, gradients and weights; errors name the rows.

Training stops before an optimizer step with a non-finite loss or gradient, which would make every weight NaN. The check
reads one number per optimizer step: the norm of the gradients, which clipping needs anyway, plus the losses. On a GPU
the read waits for the backward pass. It cannot wait until the next step, since the weights are lost by then. It costs
little: user tables with sparse gradients synchronize at the same point, to count their rows.

A finite gradient may still make a weight, or an average of the optimizer, infinite. The next step would detect that
only if it reaches the loss; but there may be no next step, and a user's row may not be used again. So `check_state`
checks everything that a checkpoint would hold before a validation, before a save, and at the end of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from prlhf_lightning.errors import NonFiniteError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.distributed import gather_objects, mean_over_processes
from prlhf_lightning.training.micro_batch import describe_row
from prlhf_lightning.types import PreferenceBatch
from prlhf_lightning.utils.finite import are_finite, named_not_finite
from prlhf_lightning.utils.modes import eval_mode

_NAMED = 3  # rows


class FiniteGuard:
    """Checks the batches of each optimizer step before the step."""

    def __init__(self) -> None:
        self._seen: list[tuple[PreferenceBatch, Tensor]] = []

    def watch(self, batch: PreferenceBatch, losses: Tensor) -> None:
        """Add a batch of the coming step.

        Args:
            batch: B pairs.
            losses: `[B]` their losses.
        """
        self._seen.append((batch, losses.detach()))

    def may_step(self, norm: Tensor, trainer: Trainer) -> bool:
        """Return whether losses and gradients of the step are finite in all processes; if so, reset for the next step.

        Args:
            norm: `[]` norm of all gradients.
            trainer: The trainer; all processes must call this.
        """
        # A float16 gradient scaler detects infinite gradients itself, skips their step and reduces the scale: that is
        # how it finds the largest scale. The losses are not scaled.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        parts = [losses.sum() for _, losses in self._seen] + ([] if scaled else [norm])
        # A sum is finite only if all its terms are.
        together = torch.stack([part.float() for part in parts]).sum() if parts else None
        if together is not None and not mean_over_processes(trainer, together).isfinite():
            return False
        self.forget()
        return True

    def error(
        self,
        module: LightningModule,
        params: Sequence[nn.Parameter],
        losses_of: Callable[[PreferenceBatch], Tensor] | None,
        advice: Sequence[str],
    ) -> NonFiniteError:
        """Return the error to raise when `may_step` returns False; all processes must call this.

        Args:
            module: The trained module.
            params: Its trained parameters.
            losses_of: Computes the losses `[B]` of a batch, called row by row; None if one process alone cannot.
            advice: What to try, in order.
        """
        trainer = module.trainer
        if not finite_everywhere(trainer, params, module.device):
            return _error(trainer.global_step, None, advice)
        records = self._of_losses()
        if not records and losses_of is not None:
            # In eval mode, dropout and running states of losses do not affect the search.
            with eval_mode(module), trainer.precision_plugin.train_step_context():
                records = self._of_gradients(losses_of, params)
        rows = [f"{describe_row(trainer, record)} (user {user_id!r})" for record, user_id in records]
        named = [row for part in gather_objects(trainer, rows) for row in part]
        return _error(trainer.global_step, named, advice, searched=losses_of is not None)

    def forget(self) -> None:
        """Reset for a new step."""
        self._seen = []

    def _of_losses(self) -> list[tuple[int, str]]:
        """Return record and user of this process's rows with a non-finite loss."""
        return [
            (int(batch.records[row]), batch.user_ids[row])
            for batch, losses in self._seen
            for row in (~losses.isfinite()).nonzero().flatten().tolist()
        ]

    def _of_gradients(
        self, losses_of: Callable[[PreferenceBatch], Tensor], params: Sequence[nn.Parameter]
    ) -> list[tuple[int, str]]:
        """Return record and user of this process's rows with a non-finite gradient."""
        return [
            (int(row.records[0]), row.user_ids[0])
            for batch, _ in self._seen
            for row in _rows(batch)
            if not _has_finite_gradients(losses_of(row), params)
        ]


def finite_everywhere(trainer: Trainer, tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Return whether tensors are finite in every process; all processes must call this.

    Shards of a policy may be finite in one process and not in another, and all processes must decide the same.
    """
    intact = torch.full((), float(are_finite(tensors)), device=device)
    return bool(mean_over_processes(trainer, intact) == 1)


def trained_state(module: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """Return everything that training changes, by name: weights, loss state, and the optimizer's averages."""
    found = {name: param for name, param in module.named_parameters() if param.requires_grad}
    names = {id(param): name for name, param in found.items()}
    state: dict[str, Tensor] = {**found, **{n: value for n, value in module.named_buffers() if n.startswith("loss.")}}
    for optimizer in trainer.optimizers:
        for param, values in optimizer.state.items():
            state |= {
                f"the optimizer's {key} of {names.get(id(param), 'a weight')}": value
                for key, value in values.items()
                if isinstance(value, Tensor) and value.dim()
            }
    return state


def check_state(
    module: LightningModule, advice: Sequence[str], tables: Iterable[str], users: Sequence[str], together: bool
) -> None:
    """Raise if trained state is not finite, at the cost of one pass over the content of a checkpoint.

    Args:
        module: The trained module.
        advice: Settings to try, in order.
        tables: Names of the weights with one row per user.
        users: The users, in the order of the rows.
        together: Whether each process checks its own shard and all call this; otherwise each has everything.

    Raises:
        NonFiniteError: Something is not finite. All processes raise it.
    """
    trainer = module.trainer
    state = trained_state(module, trainer)
    if finite_everywhere(trainer, state.values(), module.device) if together else are_finite(state.values()):
        return
    wrong = named_not_finite(state, tables, users) or "state of another process"
    raise NonFiniteError(
        f"The weights became infinite or NaN by step {trainer.global_step}, with finite gradients: {wrong}. "
        f"They are not saved. Resume from an earlier checkpoint, and: {'; '.join(advice)}."
    )


def what_to_try(trainer: Trainer, policy: Policy, loss: PreferenceLoss) -> list[str]:
    """Return the settings to change, in order, after a non-finite loss or gradient."""
    half = "16" in str(trainer.precision) and "bf16" not in str(trainer.precision)
    half = half or getattr(policy, "dtype", None) == "float16"
    return [
        *(["use bfloat16 (trainer.precision, model.policy.dtype), since float16 ends at 65504"] if half else []),
        *([] if trainer.gradient_clip_val else ["set trainer.gradient_clip_val: 1.0"]),
        "lower model.optim.lr and model.optim.user_lr, or lengthen model.optim.warmup_steps",
        f"lower model.loss.beta ({loss.beta:g})",
    ]


def _error(step: int, rows: Sequence[str] | None, advice: Sequence[str], searched: bool = True) -> NonFiniteError:
    """Return the error that stops training.

    Args:
        step: Number of steps before.
        rows: The offending rows, each with position and user; None if the weights themselves are not finite.
        advice: What to try, in order.
        searched: Whether the gradient of each row was computed.
    """
    tried = "; ".join(advice)
    if rows is None:
        return NonFiniteError(
            f"The weights became infinite or NaN in step {step}, with a finite gradient. Resume from an earlier "
            f"checkpoint, and: {tried}."
        )
    named = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    unnamed = "from no single row, but from the batch as a whole" if searched else "while all losses were finite"
    culprit = f"from {named}" if rows else unnamed
    return NonFiniteError(
        f"Loss or gradient became infinite or NaN after step {step}, {culprit}. That step was not taken. Look at the "
        f"rows if they are always the same. Otherwise: {tried}. If it happens again right after resuming, use "
        "an earlier checkpoint."
    )


def _rows(batch: PreferenceBatch) -> Iterator[PreferenceBatch]:
    for row, user_id in enumerate(batch.user_ids):
        part = batch.select(torch.tensor([row], device=batch.records.device))
        yield replace(part, user_ids=(user_id,), reference_keys=())


def _has_finite_gradients(losses: Tensor, params: Sequence[nn.Parameter]) -> bool:
    # Not `backward`, which would add to the gradients and make DDP wait for the other processes.
    grads = torch.autograd.grad(losses.sum(), params, allow_unused=True)
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
    return all(bool(value.isfinite().all()) for value in values)
