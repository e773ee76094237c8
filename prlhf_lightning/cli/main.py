"""Entry point `prlhf-lightning COMMAND ...`: finds and runs the command, and prints errors without a stack trace."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from prlhf_lightning import __version__
from prlhf_lightning.cli.commands import PROGRAM, Group, Task, described, find, refusal
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.utils.io import system_error
from prlhf_lightning.utils.terminal import LAYOUT, printable, shortened

#: Error numbers of failed writes.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: Exit code of a command that Ctrl+C ended.
INTERRUPTED = 130


def main(args: list[str] | dict[str, Any] | None = None) -> None:
    """Run the command line; errors that users can fix are printed without a stack trace.

    Args:
        args: The words, by default those of the process, or a configuration for Lightning's commands.
    """
    for message in (
        ".*LeafSpec.*",  # Lightning's use of torch's pytree
        ".*overridden `on_before_batch_transfer`.*",  # on purpose
        ".*smaller than the logging interval.*",  # LogShortRuns handles it
        ".*in eval mode at the start of training.*",  # a frozen backbone
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises an add-on at each start, as a warning.
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:  # Ctrl+C, for example while modules are loaded
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # Libraries that call us may wrap our errors.
        told = next((said for e in _causes(error) if (said := _for_people(e))), None)
        if told is None:
            raise
        _drop_output_that_cannot_be_written()
        sys.exit(f"error: {printable(shortened(told), LAYOUT)}")


def _drop_output_that_cannot_be_written() -> None:
    """Prevent Python from writing the output again at exit, with its own error message, on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str] | dict[str, Any] | None) -> None:
    """Run a command; its modules are imported only here, since that takes seconds."""
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:
        print(f"prlhf_lightning {__version__}")
        return
    command, path = find(words) if isinstance(words, list) else (None, [])
    rest = words[len(path) :] if isinstance(words, list) else []
    if isinstance(command, Task):
        from prlhf_lightning.cli.parser import run_task

        run_task(command.load(), [*path], rest)
    elif isinstance(command, Group) and rest[:1] in (["-h"], ["--help"]):
        print(described(command, path))
    elif isinstance(command, Group) and (path or not rest or not rest[0].startswith("-")):
        sys.stderr.write(refusal(command, path, rest[0] if rest else None) + "\n")
        sys.exit(2)
    else:  # a command of Lightning; options may come before it
        from prlhf_lightning.cli.fit import run_training

        # Not the words: Lightning would warn of some that it could have read itself.
        run_training(args, " ".join([PROGRAM, *path]))


def _for_people(error: BaseException) -> str:
    """Return the message of an error that users can fix, or an empty string."""
    said = str(error).strip()
    if isinstance(error, PRLHFError):
        return said
    # A class with a missing package, such as WandbLogger, names it; an error with a name is a bug in a user's file.
    if isinstance(error, ModuleNotFoundError):
        return said if error.name is None else ""
    # EarlyStopping reports a misspelled monitor with the existing names, but with a generic error class.
    return said if str(error).startswith("Early stopping conditioned on metric") else _of_a_library(error, said)


def _of_a_library(error: BaseException, said: str) -> str:
    # The failing library is already loaded; importing it for every error would take seconds.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from prlhf_lightning.training.callbacks import is_out_of_memory

    if is_out_of_memory(error):
        noted = " ".join(getattr(error, "__notes__", []))
        return noted or f"There is not enough memory ({said.partition(chr(10))[0] or type(error).__name__})."
    # This package's writes name their file; this is for other libraries and the standard output.
    cause = system_error(error)
    if cause is not None and cause.errno in _OF_THE_DISK:
        return f"{cause.filename or 'A file, or the output,'} could not be written: {cause.strerror}."
    return said if isinstance(error, MisconfigurationException) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
