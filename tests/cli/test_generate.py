"""The `generate` command: one answer streamed, several side by side, files in and out."""

from __future__ import annotations

import json

import pytest
from conftest import write_votes
from short_runs import fit, run_config

from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.inference import GenerationRequest


@pytest.fixture(scope="module")
def checkpoint(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    votes = write_votes(folder / "votes.jsonl", {"ann": 12, "bob": 12})
    config = run_config(
        folder,
        {"model": model_path},
        votes,
        model={"optim": {"lr": 0.05, "user_lr": 1.0}, "cache_reference": False},
        data={"user_text_format": "{user_text} likes ", "cache_dir": str(folder / "cache")},
    )
    return fit(folder, config)


def generate(checkpoint, *options):
    main(["generate", "--model", str(checkpoint), "--max_new_tokens", "6", "--device", "cpu", *options])


def answer(checkpoint, prompt, user, **how) -> str:
    return open_writer(checkpoint).generate([GenerationRequest(prompt, user, max_new_tokens=6, **how)])[0].text


def test_one_answer_is_written_as_it_is(checkpoint, capsys):
    generate(checkpoint, "--prompt", "the cat", "--user", "ann")
    assert capsys.readouterr().out == answer(checkpoint, "the cat", "ann") + "\n"


def test_answers_stand_side_by_side_and_unknown_users_are_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    generate(checkpoint, "--prompt", "the cat", "--user", "ann", "eve", "--blend", "{ann: 0.25, bob: 0.75}")
    shown = capsys.readouterr()
    assert shown.err.strip().endswith("Unknown users, who get the generic user's answer: eve")
    (titles,) = [line for line in shown.out.splitlines() if " ann " in line and " eve " in line]
    assert " 0.25 ann + 0.75 bob" in titles
    for user in ("ann", "eve", {"ann": 0.25, "bob": 0.75}):
        assert answer(checkpoint, "the cat", user) in shown.out


def test_files_of_prompts_become_files_of_answers(checkpoint, tmp_path):
    rows = [{"prompt": "a dog", "user_id": "bob", "id": "x"}, {"prompt": "red sun"}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    options = ["--user", "ann", "bob", "--strength", "0.5", "--output", str(tmp_path / "out.jsonl")]
    generate(checkpoint, "--prompts", str(tmp_path / "in.jsonl"), *options)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["user_id"]) for row in written] == [("x", "bob"), (3, "ann"), (3, "bob")]
    for row in written:
        assert row["completion"] == answer(checkpoint, row["prompt"], row["user_id"], strength=0.5)
        assert (row["known_user"], row["strength"]) == (True, 0.5)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_failed_run_leaves_the_old_answers(checkpoint, tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(SystemExit, match="no text about users"):
        generate(checkpoint, "--prompt", "a", "--user_text", "likes cats", "--output", str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_checkpoints_remember_how_text_became_ids(checkpoint):
    assert open_writer(checkpoint).tokenization.user_text_format == "{user_text} likes "


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"in.jsonl:2: this is not JSON"),
        ("[]", r"in.jsonl:2: this is not a JSON object"),
        ('{"prompt": 3}', r"in.jsonl:2: field 'prompt' must be a string, or a list of messages"),
        ('{"prompt": "a", "user_id": 7.5}', r"in.jsonl:2: field 'user_id' is of type float; ids are strings"),
        ('{"prompt": "a", "user_id": ""}', r"in.jsonl:2: field 'user_id' is empty"),
    ],
)
def test_rows_that_are_no_prompts_are_named(checkpoint, tmp_path, line, says):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(SystemExit, match=says):
        generate(checkpoint, "--prompts", str(tmp_path / "in.jsonl"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give one of --prompt and --prompts"),
        (["--prompt", "a", "--user", ""], "user: an id is empty"),
        (["--prompt", "a", "--blend", "{ann: 1, '': 1}"], "user: an id is empty"),
        (["--prompt", "a", "--blend", "{ann: 1, bob: 0}"], "the share of 'bob' is 0.0; it must be above 0"),
        (["--prompt", "a", "--device", "nonsense"], "device: 'nonsense' can't be used here"),
    ],
)
def test_what_can_not_be_done_is_said(checkpoint, options, says):
    with pytest.raises(SystemExit, match=says):
        generate(checkpoint, *options)


def test_what_is_neither_checkpoint_nor_export_is_named(tmp_path):
    with pytest.raises(SystemExit, match="model: there is no checkpoint"):
        generate(tmp_path / "nothing.ckpt", "--prompt", "a")
    with pytest.raises(SystemExit, match=r"model: .* has no prlhf.json; give a folder that `export` wrote"):
        generate(tmp_path, "--prompt", "a")


def test_ids_that_were_hashed_in_training_are_hashed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_SALT", "0123456789abcdef")
    output = ["--output", str(tmp_path / "out.jsonl"), "--hash_user_ids_with", "STUDY_SALT"]
    generate(checkpoint, "--prompt", "a", "--user", "ann", *output)
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (row["user_id"], row["known_user"]) == (Pseudonyms(b"0123456789abcdef")("ann"), False)


def test_control_characters_do_not_reach_the_terminal(checkpoint, capsys, monkeypatch):
    writer = open_writer(checkpoint)
    monkeypatch.setattr("prlhf_lightning.cli.generate.open_writer", lambda *_: writer)
    monkeypatch.setattr(writer.tokenizer, "decode", lambda ids, **_: "\x1b[31mred" if len(ids) else "")
    generate("unused", "--prompt", "the cat", "--user", "ann")
    assert capsys.readouterr().out.startswith("\\u001b[31mred")
