"""Ids, prompts, names and paths are text on the command line and in configuration files, whatever YAML makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from odd_texts import ODD

from prlhf_lightning.cli.parser import run_task


def parsed(*words: str) -> dict[str, object]:
    """Return what a task gets of words of the command line."""
    got: dict[str, object] = {}

    def task(
        user: str | list[str] | None = None,
        prompt: str | None = None,
        blend: dict[str, float] | None = None,
        output: Path | None = None,
        name: str = "t",
        count: int | None = 3,
    ) -> None:
        """Do nothing."""
        got.update(user=user, prompt=prompt, blend=blend, output=output, name=name, count=count)

    run_task(task, ["task"], list(words))
    return got


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_what_was_typed(text):
    path = text or "x"  # an empty path is refused
    got = parsed("--user", text, "b", "--prompt", text, "--name", text, "--output", path)
    assert got == {"user": [text, "b"], "prompt": text, "name": text, "output": Path(path), "blend": None, "count": 3}
    joined = parsed(f"--user={text}", f"--prompt={text}", f"--name={text}", f"--output={path}")
    assert joined == got | {"user": [text]}


@pytest.mark.parametrize("words", [["--user", "a", "b"], ["--user", "a", "--user=b"], ["--user+", "a", "--user+=b"]])
def test_a_list_may_be_given_in_one_go_or_in_several(words):
    assert parsed(*words, "--count", "4") == parsed("--count", "4", *words)
    assert parsed(*words)["user"] == ["a", "b"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_survives_the_command_line(text):
    assert parsed(f"--user={text}", f"--prompt={text}")["user"] == [text]


@pytest.mark.parametrize("text", [text for text in ODD if text.isprintable()])
def test_a_text_is_what_a_configuration_says(text, tmp_path):
    content = {"user": [text, "b"], "prompt": text, "blend": {text: 0.5, "b": 0.5}, "count": 5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    got = parsed("--config", str(path))
    assert {name: got[name] for name in content} == content


def test_a_bare_word_of_a_configuration_is_text_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("user: [007, null, yes, 1e3, 2024-01-01, 1_000, ~]\nprompt: 007\nblend: {007: 0.5, null: 5e-1}\n")
    got = parsed("--config", str(path), "--name", "null")
    assert got["user"] == ["007", "null", "yes", "1e3", "2024-01-01", "1_000", "~"]
    assert (got["prompt"], got["blend"], got["name"]) == ("007", {"007": 0.5, "null": 0.5}, "null")
    path.write_text("user: 007\nprompt: null\ncount: null\n")
    got = parsed("--config", str(path))
    assert (got["user"], got["prompt"], got["count"]) == (["007"], None, None)  # null: as if not given
    assert parsed("--config", str(path), "--prompt", "z")["prompt"] == "z"


@pytest.mark.parametrize(
    "ids", ["{1021: 0.5, 1024: 0.5}", "{007: 0.25, null: 0.75}", '{"[x]": 1}', "{yes: .5, '{a}': .5}"]
)
def test_the_ids_of_a_blend_are_text(ids):
    as_strings = yaml.load(ids, Loader=yaml.BaseLoader)
    assert parsed("--blend", ids)["blend"] == {name: float(share) for name, share in as_strings.items()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--blend", "{[x]: 0.5, b: 0.5}"], "quote names with special characters"),
        (["--blend", "{a: b}"], "must give each name a number"),
        (["--blend", "ann"], "must be a mapping"),
        (["--blend", "{ann: 0.5, bob: 0.5, 'ann': 1}"], "'ann' is given twice"),
        (["--blend", "{null: 0.5, 'null': 0.5}"], "'null' is given twice"),
        (["--output", ""], "is not a path; give a file or folder"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--user", "--prompt", "x"], "--user: expected one argument"),
        (["--user", "\udcff"], "is not valid UTF-8"),
        (["--promt", "x"], "'promt': did you mean 'prompt'?"),
        (["--pro", "x"], "unrecognized arguments: --pro x"),  # half a name is no name
    ],
)
def test_what_is_no_text_is_named(words, says, capsys):
    with pytest.raises(SystemExit):
        parsed(*words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "a.yaml", "--user", "bob"],
        ["--user=bob", "--config=a.yaml"],
        ["--config", "a.yaml", "--user+", "bob"],
        ["--config", "a.yaml", "--config", "b.yaml"],
    ],
)
def test_a_list_that_is_given_in_two_places_is_refused(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("user: [ann]\n")
    Path("b.yaml").write_text("user: bob\n")
    with pytest.raises(SystemExit):
        parsed(*words)
    said = capsys.readouterr().err
    assert "--user is given in" in said
    assert "a.yaml" in said


@pytest.mark.parametrize(
    "text", ["user: [ann]\nuser: [bob]\n", "blend: {ann: 1, 'ann': 2}\n", '{"user": "a", "user": "b"}']
)
def test_a_configuration_with_a_key_twice_is_refused(text, capsys, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parsed("--config", str(tmp_path / "a.yaml"))
    assert "is given twice" in capsys.readouterr().err


def test_a_printed_configuration_is_read_back(capsys, tmp_path):
    words = ["--user", "007", "null", "[x]", "--prompt", "yes", "--output", "1e3", "--blend", "{7: 1}"]
    with pytest.raises(SystemExit):
        parsed(*words, "--print_config")
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert parsed("--config", str(tmp_path / "config.yaml")) == parsed(*words)
