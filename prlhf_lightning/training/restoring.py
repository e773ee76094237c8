"""Lightning's own part of going on from a checkpoint: loops, callbacks, optimizers, whatever a file says of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import Trainer

from prlhf_lightning.utils.load_errors import opening

_STEPS = ("restore_datamodule", "_restore_modules_and_callbacks", "restore_training_state")


def refuse_odd_checkpoints(trainer: Trainer) -> None:
    """Have a trainer say which checkpoint can't be used, where restoring it fails in a way of Lightning's."""
    connector: Any = trainer._checkpoint_connector  # Lightning asks nobody else before it restores

    def named(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def restore(*args: Any, **kwargs: Any) -> Any:
            with opening(f"ckpt_path: {trainer.ckpt_path}", "Use a checkpoint that `fit` wrote."):
                return step(*args, **kwargs)

        return restore

    for name in _STEPS:
        setattr(connector, name, named(getattr(connector, name)))
