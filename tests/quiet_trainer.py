"""The Trainer that most tests train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """Return a trainer on the CPU that logs nothing and shows nothing."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, **options})
