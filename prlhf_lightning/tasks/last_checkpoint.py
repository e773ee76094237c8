"""Where the last run got to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning import checkpoint_files
from prlhf_lightning.checkpoint_entry import entry_of
from prlhf_lightning.errors import DamagedCheckpointError

_META = "meta.pt"  # in a checkpoint that is a folder, what is not in shards


def last_checkpoint(*roots: str | Path, started_from: Mapping[str, str] | None = None) -> Path | None:
    """Return the newest intact checkpoint of the newest run that has any, or None where no run has.

    Where newer ones are damaged, a warning names them and the one that is returned. Those of earlier runs, which may
    have been about something else, do not stand in for them.

    Args:
        roots: Folders of runs.
        started_from: Look only at runs that were started from this source (`checkpoint_files.origin`).

    Raises:
        DamagedCheckpointError: The newest run has none that is intact.
    """
    folders = {
        folder for root in roots for depth in ("", "*/", "*/*/") for folder in Path(root).glob(f"{depth}checkpoints")
    }
    runs = [files for folder in folders if (files := checkpoint_files.in_order(folder))]
    runs.sort(key=lambda files: files[0].stat().st_mtime_ns, reverse=True)
    run = next((files for files in runs if started_from is None or _began_with(files, started_from)), None)
    if run is None:
        return None
    chosen = checkpoint_files.newest_intact(run[0].parent)
    damaged = [str(path) for path in (run[: run.index(chosen)] if chosen else run)]
    if chosen is None:
        raise DamagedCheckpointError(
            f"ckpt_path: no checkpoint of the last run is intact ({', '.join(damaged)}). Name one of an earlier run by "
            "its path, or start anew without --ckpt_path."
        )
    if damaged:
        rank_zero_warn(f"Damaged: {', '.join(damaged)}. The newest intact checkpoint of that run is used: {chosen}")
    return chosen


def is_start_of(source: Mapping[str, str], content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run that was started from a source (`fit --init_from`).

    Args:
        source: `checkpoint_files.origin` of the source. The path alone counts where the source is no longer there.
        content: What the checkpoint holds.
    """
    began = entry_of(content).get("started_from") or {}
    name = "digest" if source["digest"] else "path"
    return bool(began) and began[name] == source[name]


def _began_with(files: list[Path], source: Mapping[str, str]) -> bool:
    """Whether a run was started from a source, as the first of its checkpoints says that can be read."""
    for path in files:
        try:
            # Only this run's own checkpoint is checked in full later: of large ones that takes long.
            content = torch.load(path / _META if path.is_dir() else path, "cpu", weights_only=True, mmap=True)
            return is_start_of(source, content)
        except Exception:  # what is damaged fails in any way at all
            continue
    return False
