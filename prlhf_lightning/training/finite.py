"""Stops training before an optimizer step on a loss or a gradient that is not finite, and says which rows it came from.

Such a step would make every weight NaN. The check is one read of one number an optimizer step: the norm of the
gradients, which clipping needs anyhow, plus the losses. On a GPU the read waits for the backward pass. That can't be
put off to the next step, for by then the weights are lost, and it costs little: user tables with sparse gradients wait
at the same place, to count their rows.

A finite gradient may still make a weight infinite, or an average of the optimizer's. The next step would find it where
it reaches the loss, but there may be none, and a user's row may not be asked for again. So `check_state` looks at all
that a checkpoint would hold, before a validation, before it is saved, and when training ends.
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
    """Looks at the batches of each optimizer step before it is taken."""

    def __init__(self) -> None:
        self._seen: list[tuple[PreferenceBatch, Tensor]] = []

    def watch(self, batch: PreferenceBatch, losses: Tensor) -> None:
        """Take note of a batch of the coming step.

        Args:
            batch: B pairs.
            losses: `[B]` their losses.
        """
        self._seen.append((batch, losses.detach()))

    def may_step(self, norm: Tensor, trainer: Trainer) -> bool:
        """Return whether the coming step's losses and gradients are finite on every process; if so, begin a new one.

        Args:
            norm: `[]` norm of all gradients.
            trainer: What trains; all processes must call this.
        """
        # A scaler of float16 gradients looks for infinite ones itself, skips their step and scales less: that is its
        # normal way to find the largest scale. The losses are not scaled.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        parts = [losses.sum() for _, losses in self._seen] + ([] if scaled else [norm])
        # A sum is finite only where all that it is made of is.
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
        """Return what stops training where `may_step` says no; all processes must call this.

        Args:
            module: What is trained.
            params: Its parameters that are.
            losses_of: Computes the losses `[B]` of a batch anew, which is done row by row; None if one process alone
                cannot.
            advice: What to try, in order.
        """
        trainer = module.trainer
        if not finite_everywhere(trainer, params, module.device):
            return _error(trainer.global_step, None, advice)
        records = self._of_losses()
        if not records and losses_of is not None:
            # Dropout, and losses that keep a running state, leave the search alone.
            with eval_mode(module), trainer.precision_plugin.train_step_context():
                records = self._of_gradients(losses_of, params)
        rows = [f"{describe_row(trainer, record)} (user {user_id!r})" for record, user_id in records]
        named = [row for part in gather_objects(trainer, rows) for row in part]
        return _error(trainer.global_step, named, advice, searched=losses_of is not None)

    def forget(self) -> None:
        """Begin a new step."""
        self._seen = []

    def _of_losses(self) -> list[tuple[int, str]]:
        """Return record and user of this process's rows whose loss is not finite."""
        return [
            (int(batch.records[row]), batch.user_ids[row])
            for batch, losses in self._seen
            for row in (~losses.isfinite()).nonzero().flatten().tolist()
        ]

    def _of_gradients(
        self, losses_of: Callable[[PreferenceBatch], Tensor], params: Sequence[nn.Parameter]
    ) -> list[tuple[int, str]]:
        """Return record and user of this process's rows whose gradient is not finite."""
        return [
            (int(row.records[0]), row.user_ids[0])
            for batch, _ in self._seen
            for row in _rows(batch)
            if not _has_finite_gradients(losses_of(row), params)
        ]


def finite_everywhere(trainer: Trainer, tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Return whether tensors are finite in every process; all must call this.

    Parts of a sharded policy may be finite in one process and not in another, and all must do the same.
    """
    intact = torch.full((), float(are_finite(tensors)), device=device)
    return bool(mean_over_processes(trainer, intact) == 1)


def trained_state(module: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """Return what training changes, by name: weights, what a loss keeps, and the optimizer's averages of gradients."""
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
    """Stop training where a step has left what must not be saved; it costs one pass over what a checkpoint holds.

    Args:
        module: What is trained.
        advice: What to try, in order.
        tables: Names of the weights that have a row a user.
        users: The users, in the order of the rows.
        together: Whether each process looks at its own part, and all call this; else each has all of it.

    Raises:
        NonFiniteError: Something is not finite. All processes raise it.
    """
    trainer = module.trainer
    state = trained_state(module, trainer)
    if finite_everywhere(trainer, state.values(), module.device) if together else are_finite(state.values()):
        return
    wrong = named_not_finite(state, tables, users) or "what another process holds"
    raise NonFiniteError(
        f"The weights became infinite or NaN by step {trainer.global_step}, by gradients that were finite: {wrong}. "
        f"They are not saved. Go on from an earlier checkpoint, and: {'; '.join(advice)}."
    )


def what_to_try(trainer: Trainer, policy: Policy, loss: PreferenceLoss) -> list[str]:
    """Return which settings to change, in order, where a loss or a gradient is not finite."""
    half = "16" in str(trainer.precision) and "bf16" not in str(trainer.precision)
    half = half or getattr(policy, "dtype", None) == "float16"
    return [
        *(["use bfloat16 (trainer.precision, model.policy.dtype), for float16 ends at 65504"] if half else []),
        *([] if trainer.gradient_clip_val else ["set trainer.gradient_clip_val: 1.0"]),
        "lower model.optim.lr and model.optim.user_lr, or lengthen model.optim.warmup_steps",
        f"lower model.loss.beta ({loss.beta:g})",
    ]


def _error(step: int, rows: Sequence[str] | None, advice: Sequence[str], searched: bool = True) -> NonFiniteError:
    """Return what stops training.

    Args:
        step: Number of steps that were taken before.
        rows: The offending rows, each with its place and user; None if the weights themselves are not finite.
        advice: What to try, in order.
        searched: Whether rows were asked one by one for their gradient.
    """
    tried = "; ".join(advice)
    if rows is None:
        return NonFiniteError(
            f"The weights became infinite or NaN in step {step}, by a gradient that was finite. Go on from an earlier "
            f"checkpoint, and: {tried}."
        )
    named = ", ".join(rows[:_NAMED]) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
    unnamed = "from no single row, but from all of its batch together" if searched else "while all losses were finite"
    culprit = f"from {named}" if rows else unnamed
    return NonFiniteError(
        f"Loss or gradient became infinite or NaN after step {step}, {culprit}. That step was not taken. Look at the "
        f"rows if they are always the same. Otherwise: {tried}. If it happens at once when you go on from here, take "
        "an earlier checkpoint."
    )


def _rows(batch: PreferenceBatch) -> Iterator[PreferenceBatch]:
    for row, user_id in enumerate(batch.user_ids):
        part = batch.select(torch.tensor([row], device=batch.records.device))
        yield replace(part, user_ids=(user_id,), reference_keys=())


def _has_finite_gradients(losses: Tensor, params: Sequence[nn.Parameter]) -> bool:
    # Not `backward`, which would add to the gradients, and have DDP wait for the other processes.
    grads = torch.autograd.grad(losses.sum(), params, allow_unused=True)
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
    return all(bool(value.isfinite().all()) for value in values)
