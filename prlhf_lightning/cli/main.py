"""`python -m prlhf_lightning COMMAND ...`: finds the command, runs it, and says what is wrong without a stack trace."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from prlhf_lightning import __version__
from prlhf_lightning.cli.commands import PROGRAM, Group, Task, described, find, refusal
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.utils.io import system_error
from prlhf_lightning.utils.terminal import LAYOUT, printable, shortened

#: What the system says where nothing more can be written.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: What a shell expects of a command that Ctrl+C ended.
INTERRUPTED = 130


def main(args: list[str] | dict[str, Any] | None = None) -> None:
    """Run the command line; an error that a person can mend is printed without a stack trace.

    Args:
        args: Its words, those of the process by default, or a configuration for Lightning's commands.
    """
    for message in (
        ".*LeafSpec.*",  # Lightning's use of torch's pytree
        ".*overridden `on_before_batch_transfer`.*",  # on purpose
        ".*smaller than the logging interval.*",  # LogShortRuns sees to it
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises an add-on at each start, in the voice of a warning.
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:  # Ctrl+C, as while the command's modules are loaded
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever reads our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # An error of ours may come wrapped in those of the libraries that called us.
        told = next((said for e in _causes(error) if (said := _for_people(e))), None)
        if told is None:
            raise
        _drop_output_that_cannot_be_written()
        sys.exit(f"error: {printable(shortened(told), LAYOUT)}")


def _drop_output_that_cannot_be_written() -> None:
    """Keep Python from a second try when it ends, which it would tell in words of its own, where a disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str] | dict[str, Any] | None) -> None:
    """Run a command; what it needs is imported here, and only here: it takes seconds."""
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
    else:  # a command of Lightning's, before which options may stand
        from prlhf_lightning.cli.fit import run_training

        # Not the words: Lightning would warn of some that it could have read itself.
        run_training(args, " ".join([PROGRAM, *path]))


def _for_people(error: BaseException) -> str:
    """Return what an error says of what to mend, or nothing."""
    # An error of a process that loads batches comes with the stack trace of that process in its message.
    said = re.sub(r"(?s)\ACaught \w+ in DataLoader worker.*^[\w.]+Error: ", "", str(error), flags=re.MULTILINE).strip()
    if isinstance(error, PRLHFError):
        return said
    # A class that lacks a package, such as WandbLogger, says which; what has a name is a fault in somebody's own file.
    if isinstance(error, ModuleNotFoundError):
        return said if error.name is None else ""
    # EarlyStopping answers a misspelt monitor with the names that there are, but with an error of no class of its own.
    return said if str(error).startswith("Early stopping conditioned on metric") else _of_a_library(error, said)


def _of_a_library(error: BaseException, said: str) -> str:
    # What is asked about is loaded where it has gone wrong; to load it for every mistake would take seconds.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from prlhf_lightning.training.callbacks import is_out_of_memory

    if is_out_of_memory(error):
        noted = " ".join(getattr(error, "__notes__", []))
        return noted or f"There is not enough memory ({said.partition(chr(10))[0] or type(error).__name__})."
    # What the package writes names itself; this is for what other libraries do, and for the standard output.
    cause = system_error(error)
    if cause is not None and cause.errno in _OF_THE_DISK:
        return f"{cause.filename or 'A file, or the output,'} could not be written: {cause.strerror}."
    return said if isinstance(error, MisconfigurationException) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
