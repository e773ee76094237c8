"""What is known about users, and who they are, stays out of everything that a run leaves or says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import prlhf_lightning
from prlhf_lightning.cli.main import main
from prlhf_lightning.data.privacy import Pseudonyms

SECRET, SALT = "Ann has a rare illness", "3f2a9c71d0b84e56a1c2"


@pytest.fixture
def study(tmp_path, repo_root, monkeypatch):
    """Options of a run on votes with secret texts, whose ids are hashed."""
    monkeypatch.setenv("STUDY_SALT", SALT)
    monkeypatch.setattr("prlhf_lightning.cli.fit._RUNS", str(tmp_path / "runs"))
    rows = [
        {"user_id": f"patient-{i % 3}", "prompt": f"Question {i}?", "chosen": f"Yes {i}", "rejected": f"No {i}",
         "user_text": SECRET} for i in range(30)
    ]  # fmt: skip
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--config", repo_root / "configs" / "text_and_votes.yaml", "--data.source.train", votes,
               "--data.validation_fraction", 0.2, "--model.policy.model", "builtin:byte-lm",
               "--model.policy.random_init", 0, "--model.policy.lora", "null", "--model.policy.dtype", "float32",
               "--model.policy.gradient_checkpointing", "false", "--data.hash_user_ids_with", "STUDY_SALT",
               "--trainer.default_root_dir", tmp_path / "runs", "--trainer.max_epochs", 1, "--trainer.accelerator",
               "cpu", "--trainer.enable_progress_bar", "false", "--train_baseline", "false",
               "--model.sampling.max_new_tokens", 2]  # fmt: skip
    return tmp_path, votes, [str(option) for option in options]


def left_in(folder, text):
    """Return the files that hold a text, as such or as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(Path(prlhf_lightning.__file__).parent / "assets" / "byte-lm")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    forms = [text.encode(), text.encode("utf-16-le"), *(np.array(ids, kind).tobytes() for kind in (np.int32, np.int64))]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(form in path.read_bytes() for form in forms)]


def test_a_run_leaves_no_text_about_users_no_id_and_no_salt(study, capfd, caplog):
    folder, _, options = study
    caplog.set_level(logging.DEBUG)
    main(["fit", *options])
    main(["predict", *options, "--ckpt_path", "last"])
    runs = folder / "runs"
    names = {path.name for path in runs.rglob("*")}
    assert {"config.yaml", "predictions.jsonl", "users_seen.csv", "last.ckpt"} <= names
    assert left_in(runs, SECRET) == []
    assert {path.name for path in left_in(folder / "cache", SECRET)} == {"rows.arrow"}  # as token ids, to train on
    for unwanted in ("patient-", SALT):
        assert left_in(runs, unwanted) == left_in(folder / "cache", unwanted) == []
    said = caplog.text + "".join(capfd.readouterr())
    assert not any(unwanted in said for unwanted in (SECRET, "patient-", SALT))
    (predictions,) = runs.rglob("predictions.jsonl")
    written = {json.loads(line)["user_id"] for line in predictions.read_text().splitlines()}
    assert written <= {Pseudonyms(SALT.encode())(f"patient-{i}") for i in range(3)}


@pytest.mark.parametrize(
    "changes",
    [
        {"user_text": [SECRET]},
        {"user_text": SECRET + "\ud800"},
        {"user_text": {"about": SECRET}},
        {"user_text": SECRET, "chosen": None},
        {"user_text": SECRET, "chosen": [{"role": "assistant", "content": "Yes"}]},
        {"user_text": SECRET, "chosen": "No 0"},
    ],
)
def test_a_row_that_is_refused_is_not_quoted(study, changes):
    _, votes, options = study
    row = {"user_id": "patient-0", "prompt": "Question?", "chosen": "Yes", "rejected": "No 0", **changes}
    votes.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options])
    assert "votes.jsonl:1" in str(stopped.value)
    assert SECRET not in str(stopped.value)
    assert "patient-" not in str(stopped.value)


def test_a_missing_salt_stops_a_run(study, monkeypatch):
    monkeypatch.delenv("STUDY_SALT")
    with pytest.raises(SystemExit, match="the environment variable STUDY_SALT is not set"):
        main(["fit", *study[2]])
