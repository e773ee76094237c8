"""Where the last run got to."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning import checkpoint_files
from prlhf_lightning.errors import DamagedCheckpointError


def last_checkpoint(*roots: str | Path) -> Path | None:
    """Return the newest intact checkpoint of the newest run that has any, or None where no run has.

    Where newer ones are damaged, a warning names them and the one that is returned. Those of earlier runs, which may
    have been about something else, do not stand in for them.

    Args:
        roots: Folders of runs.

    Raises:
        DamagedCheckpointError: The newest run has none that is intact.
    """
    runs = {
        folder for root in roots for depth in ("", "*/", "*/*/") for folder in Path(root).glob(f"{depth}checkpoints")
    }
    newest = {files[0]: folder for folder in runs if (files := checkpoint_files.in_order(folder))}
    if not newest:
        return None
    run = newest[max(newest, key=lambda path: path.stat().st_mtime_ns)]
    chosen = checkpoint_files.newest_intact(run)
    files = checkpoint_files.in_order(run)
    damaged = [str(path) for path in (files[: files.index(chosen)] if chosen else files)]
    if chosen is None:
        raise DamagedCheckpointError(
            f"ckpt_path: no checkpoint of the last run is intact ({', '.join(damaged)}). Name one of an earlier run by "
            "its path, or start anew without --ckpt_path."
        )
    if damaged:
        rank_zero_warn(f"Damaged: {', '.join(damaged)}. The newest intact checkpoint of that run is used: {chosen}")
    return chosen
