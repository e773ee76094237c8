"""Progress of work on rows of which the number is not known before they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_T = TypeVar("_T")
_STEP = 1000  # rows between two looks at the clock


def counting(description: str) -> Progress:
    """Return a bar with one task, that counts rows on the terminal, if there is one."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task(description, total=None)
    return progress


def counted(items: Iterable[_T], description: str) -> Iterator[_T]:
    """Yield items while a bar counts them."""
    with counting(description) as progress:
        for number, item in enumerate(items):
            if number % _STEP == 0:
                progress.update(progress.task_ids[0], completed=number)
            yield item
