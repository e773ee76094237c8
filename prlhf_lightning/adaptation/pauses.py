"""Pauses between the passes of the policy, in which whoever shares the thread can do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_between: ContextVar[Callable[[], None] | None] = ContextVar("between", default=None)


@contextmanager
def pausing(between: Callable[[], None]) -> Iterator[None]:
    """Have something called before each pass of the policy that a block makes; it must leave the model as it is."""
    token = _between.set(between)
    try:
        yield
    finally:
        _between.reset(token)


def pause() -> None:
    """Let whoever asked for pauses do something else."""
    if (between := _between.get()) is not None:
        between()
