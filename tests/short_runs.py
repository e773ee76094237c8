"""Short runs of the command line: their configurations, and how they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prlhf_lightning.cli.main import main


def run_config(folder: Path, policy: dict[str, Any], train: Path | str, **parts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a short run on the CPU.

    Args:
        folder: Folder of the run's own `runs`.
        policy: Arguments of `CausalLMPolicy`.
        train: File of feedback.
        parts: What else, or what instead, stands in a part, such as `trainer`.
    """
    content: dict[str, Any] = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder / "runs")},
        "model": {
            "user_model": {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 2}},
            "policy": {"class_path": "CausalLMPolicy", "init_args": policy},
            "loss": "DPOLoss",
        },
        "data": {"source": {"class_path": "FileSource", "init_args": {"train": str(train)}}},
    }
    return content | {name: {**content.get(name, {}), **values} for name, values in parts.items()}


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    """Write a configuration; return its file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(folder: Path, content: dict[str, Any], *options: str) -> Path:
    """Train by the command line, with all files in a folder; return the last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        main(["fit", "-c", str(write_config(folder, content)), *options])
    (checkpoint,) = (folder / "runs").glob("*/checkpoints/last.ckpt")
    return checkpoint


def reward_config(folder: Path, backbone: str, train: Path | str, **parts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a short run of a reward model with two directions; arguments as in `run_config`."""
    content = run_config(folder, {}, train)
    user_model = {"class_path": "LowRankUserModel", "init_args": {"num_tokens": 1, "rank": 2}}
    content["model"] = {"user_model": user_model, "backbone": {"model": backbone}, "precision": 30.0}
    return content | {name: {**content.get(name, {}), **values} for name, values in parts.items()}
