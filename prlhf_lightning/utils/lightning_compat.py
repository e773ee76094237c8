"""All uses of private Lightning APIs, each with its reason and the condition for its removal.

Written for lightning 2.6. `tests/utils/test_lightning_compat.py` fails if a later version changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.saving import _load_state
from torch import nn

_Module = TypeVar("_Module", bound=LightningModule)


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, or None where it has none.

    `module.trainer` raises without a trainer, and creates one under Fabric. Remove it once Lightning has a public test.
    """
    return module._trainer


def is_built_from_config() -> bool:
    """Whether LightningCLI is creating the module from a configuration, which then becomes its hyperparameters.

    `save_hyperparameters` knows, but does not tell. Remove it once a module can ask where its hyperparameters are from.
    """
    return _given_hyperparameters.get() is not None


def load_from_content(cls: type[_Module], content: Mapping[str, Any]) -> _Module:
    """Rebuild a module from the content of a checkpoint, as `load_from_checkpoint` does from a file.

    Remove it once `load_from_checkpoint` takes a mapping.
    """
    module: _Module = _load_state(cls, dict(content))  # type: ignore[assignment]
    return module


def set_device(module: nn.Module, device: torch.device) -> None:
    """Tell a LightningModule its device, where Lightning sends batches and metrics, without moving its weights.

    A sharded module is moved part by part, which Lightning does not see. Remove it once `device` can be set.
    """
    _update_properties(module, device=device)


def ends_optimizer_step(trainer: Trainer) -> bool:
    """Whether the present micro-batch is the last of its optimizer step.

    Remove it once the trainer tells.
    """
    return not trainer.fit_loop._should_accumulate()


def logs_this_step(trainer: Trainer) -> bool:
    """Whether Lightning passes what this optimizer step logs on to the loggers.

    Remove it once the trainer tells.
    """
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_training_step(trainer: Trainer) -> None:
    """Pass what the last optimizer step logged on to the loggers, where training was broken off before that.

    Remove it once the trainer does so itself when it is interrupted.
    """
    trainer._logger_connector.update_train_step_metrics()


def set_callback_metrics(trainer: Trainer, values: Mapping[str, torch.Tensor]) -> None:
    """Add to `trainer.callback_metrics`, which is a copy that can't be written to.

    For a resumed run, whose last validation was in the earlier process. Remove it once checkpoints hold these values.
    """
    trainer._logger_connector._callback_metrics.update(values)


def wrap_restoring(trainer: Trainer, context: Callable[[], AbstractContextManager[object]]) -> None:
    """Have a trainer restore loops, callbacks and optimizers within a context, such as one that explains errors.

    No hook runs around restoring. Remove it once there is one, or once Lightning checks what it reads.
    """
    connector: Any = trainer._checkpoint_connector

    def within(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def restore(*args: Any, **kwargs: Any) -> Any:
            with context():
                return step(*args, **kwargs)

        return restore

    for name in ("restore_datamodule", "_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, within(getattr(connector, name)))


def is_validation_due(trainer: Trainer) -> bool:
    """Whether the training loop validates after the present batch; False before the first batch.

    Remove it once the trainer tells.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def number_rows(trainer: Trainer) -> None:
    """Have what is logged bear the number of optimizer steps taken.

    Going on at the beginning of an epoch, Lightning (2.6.6) counts the validation that it skips as a step. It can go
    once it does not.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def has_validated(trainer: Trainer) -> bool:
    """Whether the fit has validated at least once.

    Remove it once the trainer tells.
    """
    return bool(trainer.fit_loop.epoch_loop.val_loop._has_run)


def validate_within_fit(trainer: Trainer) -> None:
    """Validate and log as the training loop does, where the weights have changed after its last validation.

    Remove it once `trainer.validate` can be called within a fit.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def save_checkpoint_alone(trainer: Trainer, path: str | Path) -> None:
    """Save a checkpoint from this process alone, without the barrier in `trainer.save_checkpoint`.

    For when the other processes may be gone. Remove it once `save_checkpoint` can leave the barrier out.
    """
    trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), path)


def replaces_sampler(trainer: Trainer) -> bool:
    """Whether the trainer replaces a data loader's sampler by a distributed one.

    Remove it once `use_distributed_sampler` is public.
    """
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)
