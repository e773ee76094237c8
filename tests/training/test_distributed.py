"""Two processes on the CPU train and evaluate as one does on the same global batches; see test_sharded.py for more."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_votes
from safetensors import safe_open

from prlhf_lightning.cli.main import main
from prlhf_lightning.user_models import IndividualUserModel

pytestmark = pytest.mark.slow

SECONDS = 120  # a process that waits for the other does so for half an hour
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2")
ONE = ("--trainer.devices", "1", "--data.batch_size", "4")


class Ranked(IndividualUserModel):
    """Starts at other offsets in every process, so that all must take the first one's."""

    def build(self, num_rows: int, token_embeddings: torch.Tensor) -> None:
        super().build(num_rows, token_embeddings)
        self.offsets.weight.data[1:] += float(os.environ.get("LOCAL_RANK", 0))


def write_config(folder: Path) -> Path:
    # 23 rows in global batches of 4, two of which make a step: the last of an epoch has 3 rows, 2 and 1. Of the seen
    # users' rows to validate on one process has 4 and the other 3; the stranger's one row leaves the other with none.
    train = write_votes(folder / "train.jsonl", {"ann": 10, "bob": 8, "cy": 5})
    validation = write_votes(folder / "validation.jsonl", {"ann": 4, "bob": 3, "stranger": 1}, seed=1)
    (folder / "one_row.jsonl").write_text(validation.read_text().partition("\n")[0] + "\n")
    content = {
        "trainer": {"max_epochs": 2, "accumulate_grad_batches": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "user_model": {"class_path": "test_distributed.Ranked", "init_args": {"num_tokens": 2}},
            "policy": {
                "class_path": "CausalLMPolicy",
                "init_args": {"model": "builtin:byte-lm", "random_init": 0, "lora": {"rank": 2}},
            },
            "loss": {"class_path": "DPOLoss", "init_args": {"beta": 1.0}},
            "optim": {"lr": 3e-3, "user_lr": 3e-2, "user_weight_decay": 0.1, "warmup_steps": 0},
        },
        "data": {
            "source": {"class_path": "FileSource", "init_args": {"train": str(train), "validation": str(validation)}}
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_two(folder: Path, command: str, *args: str) -> None:
    """Run a command in two processes, and end both if they wait for one another."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "PL_GLOBAL_SEED")},
        "PRLHF_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:3])),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "prlhf_lightning", command, "-c", str(folder / "config.yaml"), *TWO, *args]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = "none: they hang"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, (folder / "output.txt").read_text()[-3000:]


def run_one(folder: Path, command: str, *args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache_of_one"))
        main([command, "-c", str(folder / "config.yaml"), *ONE, *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_config(folder)
    run_two(folder, "fit", "--trainer.default_root_dir", str(folder / "two"))
    run_one(folder, "fit", "--trainer.default_root_dir", str(folder / "one"))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluations(run: Path) -> list[dict[str, float]]:
    """Return the logged values of each validation."""
    rows = [
        {key: float(value) for key, value in row.items() if key.startswith("val/") and value}
        for row in rows_of(run / "version_0/metrics.csv")
    ]
    return [row for row in rows if row]


def test_they_come_to_the_same_weights(folder):
    one, two = (
        torch.load(folder / run / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    assert one["user_model.offsets.weight"].abs().amax(1)[1:].min() > 0.01  # every user has moved
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_they_log_the_same_validation(folder):
    one, two = (evaluations(folder / run) for run in ("one", "two"))
    assert len(one) == len(two) == 2
    assert {"loss", "accuracy", "accuracy_user_mean", "accuracy_worst_decile", "margin", "generic_accuracy"} == {
        key.removeprefix("val/seen/") for key in one[0] if key.startswith("val/seen/")
    }
    assert "val/unseen/loss" in one[0]
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_they_log_the_same_means_of_training(folder):
    one, two = (
        [row for row in rows_of(folder / run / "version_0/metrics.csv") if row["train/loss"]] for run in ("one", "two")
    )
    assert one
    for alone, together in zip(one, two, strict=True):
        for name in ("loss", "accuracy", "margin", "chosen_log_probs", "chosen_log_ratio"):
            expected = float(alone[f"train/{name}"])
            assert float(together[f"train/{name}"]) == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", ["seen", "unseen"])
def test_they_write_the_same_table_of_users(folder, name):
    one, two = (rows_of(folder / run / f"version_0/users_{name}.csv") for run in ("one", "two"))
    assert [(row["user_id"], row["pairs"], row["accuracy"]) for row in one] == [
        (row["user_id"], row["pairs"], row["accuracy"]) for row in two
    ]


def test_neither_repeats_reference_work_of_the_other(folder):
    keys = []
    for path in (folder / "cache/reference").glob("*/*.safetensors"):
        with safe_open(path, "np") as segment:
            keys += [entry[:16].tobytes() for entry in segment.get_tensor("index")]
    assert len(keys) == len(set(keys)) == 2 * (23 + 8)


def test_they_start_from_a_checkpoint_as_one_does(folder):
    """Of the earlier users `bob` has no more votes, and `zoe` is new."""
    votes = write_votes(folder / "later.jsonl", {"ann": 6, "cy": 6, "zoe": 6}, seed=2)
    start = folder / "one/version_0/checkpoints/last.ckpt"
    words = [f"--init_from={start}", f"--data.source.train={votes}", "--trainer.max_epochs=1"]
    run_two(folder, "fit", *words, f"--trainer.default_root_dir={folder / 'later_two'}")
    run_one(folder, "fit", *words, f"--trainer.default_root_dir={folder / 'later_one'}")
    one, two = (
        torch.load(folder / run / "version_0/checkpoints/last.ckpt", weights_only=True)
        for run in ("later_one", "later_two")
    )
    assert two["prlhf_lightning"]["users"] == ["ann", "bob", "cy", "zoe"]
    before = torch.load(start, weights_only=True)["state_dict"]["user_model.offsets.weight"]
    assert torch.equal(two["state_dict"]["user_model.offsets.weight"][2], before[2])
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
