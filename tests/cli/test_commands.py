"""What the command line can be told to do, and what it loads for it."""

from __future__ import annotations

import subprocess
import sys
from inspect import getdoc

import pytest

from prlhf_lightning.cli.commands import COMMANDS, Group, Task, described, find
from prlhf_lightning.cli.fit import PRLHFCLI
from prlhf_lightning.cli.main import main


def tasks(group):
    for command in group.members.values():
        yield from tasks(command) if isinstance(command, Group) else [command] * isinstance(command, Task)


@pytest.mark.parametrize("task", list(tasks(COMMANDS)), ids=lambda task: task.place)
def test_a_command_says_what_its_function_says(task):
    assert task.summary
    assert task.summary == getdoc(task.load()).partition("\n")[0]


def test_all_of_lightnings_commands_are_there():
    assert [name for name in COMMANDS.members if name in PRLHFCLI.subcommands()] == list(PRLHFCLI.subcommands())


def test_a_command_is_found_by_its_first_words():
    users = COMMANDS.members["users"]
    assert find(["users", "list", "--model", "x"]) == (users.members["list"], ["users", "list"])
    assert find(["users"]) == find(["users", "--help"]) == (users, ["users"])
    assert find(["--help", "fit"]) == (COMMANDS, [])


def test_a_long_summary_is_wrapped_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(len(line) for line in described(COMMANDS, []).splitlines() if line.startswith("  ")) <= 60


@pytest.mark.parametrize(
    ("words", "not_loaded"),
    [
        (["--help"], "torch"),
        (["data", "--help"], "torch"),
        (["exprt"], "torch"),
        (["api-key", "--name", "x"], "torch"),
        (["users", "list", "--help"], "lightning"),
        (["data", "check", "--help"], "lightning"),
    ],
)
def test_nothing_is_loaded_that_a_command_does_not_need(words, not_loaded):
    code = (
        "import atexit, sys; from prlhf_lightning.cli.main import main\n"
        f"atexit.register(lambda: print('loaded:', {not_loaded!r} in sys.modules)); main({words!r})"
    )
    assert "loaded: False" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_lightning_reads_the_process_words_without_a_warning(monkeypatch, recwarn, capsys):
    monkeypatch.setattr(
        sys, "argv", ["prlhf_lightning", "fit", "--print_config", "--config", "configs/quickstart.yaml"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "user_model" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "args parameter" in str(warning.message)]


def test_ctrl_c_while_modules_load_gives_no_stack_trace(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prlhf_lightning.cli.commands.Task.load", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["export", "--help"])
    assert ended.value.code == 130
