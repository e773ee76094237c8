"""People with odd ids: the same person from the data through every command to the export, and nobody else."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import write_votes
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_texts import ODD
from safetensors import safe_open
from short_runs import fit, run_config

from prlhf_lightning.cli.main import main
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.user_rows import UserRows
from prlhf_lightning.utils.io import escape_cell, unescape_cell
from prlhf_lightning.utils.terminal import printable

IDS = [
    *(text for text in ODD if text.strip() and len(text) < 100),
    "[red]x",
    ":smile:",
    "$x_1$",
    "<b>&",
    "+1",
    "@a",
    "[x",
    "x",
]


@pytest.fixture(scope="module")
def run_folder(model_path, tmp_path_factory) -> Path:
    """A run of the command line on people with odd ids."""
    folder = tmp_path_factory.mktemp("odd")
    votes = write_votes(folder / "votes.jsonl", dict.fromkeys(IDS, 6))
    model = {"user_model": {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 1}}}
    policy = {"model": model_path, "lora": {"rank": 2}}
    fit(folder, run_config(folder, policy, votes, model=model, collapse={"prompts": 0}))
    return folder / "runs/version_0"


@pytest.fixture
def model(run_folder, tmp_path) -> Path:
    """A copy of the checkpoint."""
    content = checkpoint_files.load(run_folder / "checkpoints/last.ckpt")
    checkpoint_files.save(content, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def named(ids) -> list[str]:
    return [f"--user={user_id}" for user_id in ids]


def known_by(path: Path) -> tuple[str, ...]:
    return UserRows(checkpoint_files.load(path)).vocabulary.ids


def test_all_are_listed_and_shown(run_folder, capsys):
    assert set(known_by(run_folder / "checkpoints/last.ckpt")) == set(IDS)
    main(["users", "list", "--model", str(run_folder)])
    shown = capsys.readouterr().out
    assert {printable(user_id) for user_id in IDS} <= {line[34:] for line in shown.splitlines()}
    assert "\x1b" not in shown
    for user_id in IDS:
        main(["users", "show", "--model", str(run_folder), f"--user={user_id}"])
        assert capsys.readouterr().out.splitlines()[0] == f"user_id       {printable(user_id)}"


def test_all_are_written_for(run_folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = ["generate", "--model", str(run_folder), "--prompt", "the cat", "--max_new_tokens", "2"]
    main([*words, *named(IDS), "--output", str(out)])
    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [(row["user_id"], row["known_user"]) for row in rows] == [(user_id, True) for user_id in IDS]
    main([*words, *named(["[/]", "[red]x", ":smile:", "\x1b[31m"])])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("[/]", "[red]x", ":smile:", "\\u001b[31m"))


def test_new_people_with_odd_ids_are_learned_and_then_known(model, tmp_path, capsys):
    new = [f"{user_id}{user_id}" for user_id in ("[/]", "[red]x", "\x1b[31m", "null", "007", ":smile:")]
    feedback = write_votes(tmp_path / "new.jsonl", dict.fromkeys(new, 6), seed=1)
    main(["adapt", "--model", str(model), "--feedback", str(feedback), "--output", str(tmp_path / "b.ckpt")])
    shown = capsys.readouterr().out
    assert not [user_id for user_id in new if printable(user_id)[:16] not in shown]  # long ones go on below
    assert "\x1b[31m" not in shown
    assert known_by(tmp_path / "b.ckpt") == (*known_by(model), *new)


@pytest.mark.parametrize("user_id", ["[x]", "x", "007", "7", "null", "-x", "e\u0301", " x ", '"q"', "\x1b[31m", "1e3"])
def test_removing_takes_this_person_and_nobody_else(model, user_id, capsys):
    before = UserRows(checkpoint_files.load(model))
    main(["users", "remove", "--model", str(model), f"--user={user_id}"])
    after = UserRows(checkpoint_files.load(model))
    assert set(before.vocabulary.ids) - set(after.vocabulary.ids) == {user_id}
    for one in after.vocabulary.ids:
        assert torch.equal(before.vectors()[before.row(one)], after.vectors()[after.row(one)])
    raw = model.read_bytes()
    main(["users", "remove", "--model", str(model), f"--user={next(iter(after.vocabulary.ids))}"])
    with pytest.raises(SystemExit, match="is not in this model"):  # and never in silence
        main(["users", "remove", "--model", str(model), f"--user={user_id}", f"--user={after.vocabulary.ids[1]}"])
    assert after.vocabulary.ids[1] in known_by(model)
    assert raw != model.read_bytes()


def test_all_are_removed_by_a_file(model, tmp_path):
    gone = [user_id for user_id in IDS[:20] if "\n" not in user_id]
    (tmp_path / "ids.txt").write_bytes("\r\n".join(gone).encode())
    main(["users", "remove", "--model", str(model), "--user_file", str(tmp_path / "ids.txt")])
    assert set(known_by(model)) == set(IDS) - set(gone)


@pytest.mark.parametrize(
    ("typed", "meant"), [("[x]]", "'[x]'"), ("8", None), ("1e3 ", "'1e3'"), ("\u00e9 ", "'\u00e9'"), ("NULL", "'null'")]
)
def test_a_missing_id_is_answered_with_those_that_look_alike(model, typed, meant):
    with pytest.raises(SystemExit) as exit_info:
        main(["users", "remove", "--model", str(model), f"--user={typed}"])
    assert f"{typed!r} is not in this model" in str(exit_info.value)
    assert (meant or "`users list` shows who is") in str(exit_info.value)


def test_all_are_exported(run_folder, tmp_path):
    folder = tmp_path / "exported"
    some = ["[x]", "-x", "a: b", "😀"]
    main(["export", "--model", str(run_folder), "--output", str(folder), "--peft_users", "true", *named(some)])
    assert set(json.loads((folder / "users.json").read_text())["users"]) == set(IDS)
    assert len(list((folder / "peft_users").iterdir())) == len(some) + 1  # the generic user's too
    with safe_open(folder / "user_vectors.safetensors", "pt") as file:
        assert set(file.keys()) == {*IDS, ""}
    main(["generate", "--model", str(folder), "--prompt", "a", *named(IDS), "--output", str(tmp_path / "o.jsonl")])
    assert all(json.loads(line)["known_user"] for line in (tmp_path / "o.jsonl").read_text().split("\n") if line)


def test_no_id_is_a_formula_of_a_spreadsheet(run_folder):
    with (run_folder / "users_seen.csv").open(newline="") as file:
        cells = [row["user_id"] for row in csv.DictReader(file)]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert {unescape_cell(cell) for cell in cells} <= set(IDS)


@given(st.text())
def test_a_cell_is_no_formula_and_is_read_back(text):
    assert unescape_cell(escape_cell(text)) == text
    assert not escape_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))


def test_a_page_is_written_with_odd_ids(run_folder, tmp_path):
    page = tmp_path / "page.html"
    words = [
        "report",
        "--model",
        str(run_folder),
        "--output",
        str(page),
        "--show_user_ids",
        "true",
        "--num_users",
        "40",
    ]
    main([*words, "--num_prompts", "1", "--max_new_tokens", "2"])
    text = page.read_text()
    assert "<b>&<" not in text
    assert "\x1b" not in text


@settings(max_examples=15)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip))
def test_any_id_goes_through_the_commands(run_folder, tmp_path_factory, user_id):
    if user_id in IDS:
        return
    folder = tmp_path_factory.mktemp("any")
    one, two = folder / "one.ckpt", folder / "two.ckpt"
    last = str(run_folder / "checkpoints/last.ckpt")
    main(["users", "add", "--model", last, f"--user={user_id}", "--output", str(one)])
    assert known_by(one) == (*known_by(Path(last)), user_id)
    main(["users", "show", "--model", str(one), f"--user={user_id}"])
    main(["users", "remove", "--model", str(one), f"--user={user_id}", "--output", str(two)])
    assert known_by(two) == known_by(Path(last))
