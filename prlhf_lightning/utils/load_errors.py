"""One error in place of whatever a library raises over a file whose content is odd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prlhf_lightning.errors import ConfigurationError, PRLHFError

_LONGEST = 300  # characters of a cause


@contextmanager
def opening(name: str, fix: str) -> Iterator[None]:
    """Say which file can't be used where a block that reads it fails.

    Args:
        name: The setting and the file, with which the error begins.
        fix: What to do, as a clause.

    Raises:
        ConfigurationError: The block has failed in a way of its own, or with such an error that does not name the
            file. Other errors of this package, and those about memory, are left as they are.
    """
    try:
        yield
    except ConfigurationError as error:
        if type(error) is not ConfigurationError or name.rpartition(": ")[2] in str(error):
            raise
        raise ConfigurationError(f"{name}: {error}") from error
    except (PRLHFError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # panics of libraries in Rust are no `Exception`
        if "memory" in str(error):  # about which others know more
            raise
        raise ConfigurationError(f"{name} holds something that can't be used: {cause_of(error)}. {fix}") from error


def cause_of(error: BaseException) -> str:
    """Return what an error says, in a line."""
    said = " ".join(str(error).split()).rstrip(".")
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    # A name alone, as of a key that is missing, says little.
    return said if " " in said else f"{type(error).__name__}: {said}"
