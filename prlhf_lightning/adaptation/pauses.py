"""A callback between passes of the policy, so that a server can generate during adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_between: ContextVar[Callable[[], None] | None] = ContextVar("between", default=None)


@contextmanager
def pausing(between: Callable[[], None]) -> Iterator[None]:
    """Call `between` before each pass of the policy in a block; it must not change the model."""
    token = _between.set(between)
    try:
        yield
    finally:
        _between.reset(token)


def pause() -> None:
    """Call the callback of `pausing`, if any."""
    if (between := _between.get()) is not None:
        between()
