"""Progress bars on the terminal, if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_T = TypeVar("_T")
_STEP = 1000  # rows between updates


def progress_bars(show: bool = True) -> Progress:
    """Return a `Progress` for tasks of known length."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return _progress(*columns, show=show)


def tracked(items: Iterable[_T], description: str, total: float | None = None, show: bool = True) -> Iterator[_T]:
    """Yield items with a progress bar; the total is `total` or the items' length."""
    with progress_bars(show) as progress:
        yield from progress.track(items, total, description=description)


def counting(description: str) -> Progress:
    """Return a `Progress` with one task that counts rows of unknown number."""
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    progress = _progress(*columns)
    progress.add_task(description, total=None)
    return progress


def counted(items: Iterable[_T], description: str) -> Iterator[_T]:
    """Yield items and show their count."""
    with counting(description) as progress:
        for number, item in enumerate(items):
            if number % _STEP == 0:
                progress.update(progress.task_ids[0], completed=number)
            yield item


def _progress(*columns: ProgressColumn, show: bool = True) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
