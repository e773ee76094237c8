"""One clear error instead of the various errors that libraries raise for malformed files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prlhf_lightning.errors import ConfigurationError, PRLHFError

_LONGEST = 300  # characters of a cause


@contextmanager
def opening(name: str, fix: str) -> Iterator[None]:
    """Turn errors of a block that reads a file into errors that name the file.

    Args:
        name: The setting and the file; the message starts with it.
        fix: The fix, as a sentence.

    Raises:
        ConfigurationError: The block raised any other error, or a `ConfigurationError` that does not name the file.
            Other errors of this package and out-of-memory errors are raised unchanged.
    """
    try:
        yield
    except ConfigurationError as error:
        if type(error) is not ConfigurationError or name.rpartition(": ")[2] in str(error):
            raise
        raise ConfigurationError(f"{name}: {error}") from error
    except (PRLHFError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # panics of Rust libraries are not an `Exception`
        if "memory" in str(error):  # the caller handles these
            raise
        raise ConfigurationError(f"{name} can't be used: {cause_of(error)}. {fix}") from error


def cause_of(error: BaseException) -> str:
    """Return an error's message in one line."""
    message = " ".join(str(error).split()).rstrip(".")
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
    # A single word, such as a missing key, needs the type of the error.
    return message if " " in message else f"{type(error).__name__}: {message}"
