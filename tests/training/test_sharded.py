"""Two processes that share a model train, evaluate and write as one process does, and go on from its checkpoints.

So do two that each have the whole of it (DDP), in what test_distributed.py leaves out.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from test_distributed import evaluations, rows_of, write_config
from transformers import AutoModelForCausalLM

from prlhf_lightning.cli.export import export
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.policies import Sampling
from prlhf_lightning.types import Tokens

pytestmark = pytest.mark.slow

SECONDS = 240  # a process that waits for the other does so for half an hour
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
WRITE = ("--model.sampling.temperature", "0", "--model.sampling.max_new_tokens", "12")
CLIP = ("--trainer.gradient_clip_val", "0.05")
AMORTIZED = ("--model.user_model", "AmortizedUserModel", "--model.user_model.num_tokens", "2")
FULL = ("--model.policy.lora", "null", "--model.policy.gradient_checkpointing", "true")
STREAMED = ("--data.streaming", "true", "--data.shuffle_buffer", "8", "--trainer.limit_val_batches", "0")
DDP = ("--trainer.strategy", "ddp")
OVERRIDES = Path(__file__).parents[2] / "configs/overrides"
ON_CPU = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
FSDP1, FSDP2 = (("-c", str(OVERRIDES / name), *ON_CPU) for name in ("fsdp.yaml", "fsdp2.yaml"))


class Save(Callback):
    """Saves a checkpoint in the middle of the first of two epochs of three steps, and one at the end."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        is_step = (trainer.fit_loop.batch_idx + 1) % 2 == 0
        if trainer.global_step in (2, 6) and is_step:
            path = Path(trainer.default_root_dir) / f"step-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)


def run(folder: Path, name: str, command: str, *args: str) -> None:
    """Run a command in this process, alone or as one of two, with its files in a folder of that name."""
    processes = int(os.environ.get("TESTED_PROCESSES", 1))
    words = [command, "-c", folder / "config.yaml", *args, *CLIP, "--trainer.default_root_dir", folder / name]
    words += ["--trainer.devices", processes, "--data.batch_size", 4 // processes]
    words += ["--collapse.prompts", 0]  # what sharded models write is not looked at
    if command == "fit":
        words += ["--trainer.callbacks+", "test_sharded.Save"]
    main(list(map(str, words)))


def last(folder: Path, name: str) -> Path:
    return folder / name / "step-6.ckpt"


def two(folder: Path) -> None:
    """Run all that two processes have to do, so that they start only once."""
    run(folder, "two", "fit", *FSDP2)
    run(folder, "two_predict", "predict", *FSDP2, *WRITE, "--ckpt_path", str(last(folder, "two")))
    one_row = ("--data.source.validation", str(folder / "one_row.jsonl"), "--ckpt_path", str(last(folder, "one")))
    run(folder, "two_small", "validate", *FSDP2, *one_row)
    run(folder, "ddp_small", "validate", *DDP, *one_row)
    run(folder, "two_after_one", "fit", *FSDP2, "--ckpt_path", str(folder / "one/step-2.ckpt"))
    run(folder, "two_full", "fit", *FSDP2, *FULL, "--trainer.strategy.cpu_offload", "true")
    run(folder, "two_fsdp1", "fit", *FSDP1)
    for precision in ("bf16-mixed", "bf16-true"):
        run(folder, f"two_{precision}", "fit", *FSDP2, "--trainer.precision", precision)
    run(folder, "two_amortized", "fit", *FSDP2, *AMORTIZED)
    run(folder, "ddp_amortized", "fit", *DDP, *AMORTIZED)
    run(folder, "ddp_streamed", "fit", *DDP, *STREAMED)


def start(rank: int, folder: Path, port: int) -> None:
    sys.argv = ["prlhf_lightning"]
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TESTED_PROCESSES": "2", "PRLHF_CACHE": str(folder / f"cache_{rank}")}
    two(folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache_of_one"))
        run(folder, "one", "fit")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = torch.multiprocessing.spawn(start, args=(folder, port), nprocs=2, join=False)
        end = time.monotonic() + SECONDS
        try:
            while not both.join(timeout=1):
                assert time.monotonic() < end, "they hang"
        finally:
            for process in both.processes:
                process.kill()
        run(folder, "one_full", "fit", *FULL)
        run(folder, "one_streamed", "fit", *STREAMED)
        run(folder, "one_after_two", "fit", "--ckpt_path", str(folder / "two/step-2.ckpt"))
        one_row = ("--data.source.validation", str(folder / "one_row.jsonl"), "--ckpt_path", str(last(folder, "one")))
        run(folder, "one_small", "validate", *one_row)
        run(folder, "one_predict", "predict", *WRITE, "--ckpt_path", str(last(folder, "two")))
    return folder


def checkpoint(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


# Of the training in full only the tolerance differs: AdamW turns the rounding of next to no gradient into a step.
@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("two", "one", 2e-5),
        ("two_fsdp1", "one", 2e-5),
        ("two_after_one", "one", 2e-5),
        ("one_after_two", "one", 2e-5),
        ("two_full", "one_full", 5e-4),
        ("two_amortized", "ddp_amortized", 5e-5),  # one process would draw other histories
        ("ddp_streamed", "one_streamed", 2e-5),
    ],
)
def test_they_come_to_the_same_weights(folder, name, other, tolerance):
    sharded, alone = (checkpoint(last(folder, run)) for run in (name, other))
    assert sharded.keys() == alone.keys()
    assert sharded["state_dict"].keys() == alone["state_dict"].keys()
    (table,) = (w for n, w in alone["state_dict"].items() if n.endswith(("offsets.weight", "histories.weight")))
    assert table.abs().amax(1)[1:].min() > 0.01  # every user has moved
    for weight, expected in zip(sharded["state_dict"].values(), alone["state_dict"].values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=tolerance)
    for number, expected in alone["optimizer_states"][0]["state"].items():
        state = sharded["optimizer_states"][0]["state"][number]
        torch.testing.assert_close(state, expected, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(("name", "other"), [("two", "one"), ("two_fsdp1", "one"), ("two_full", "one_full")])
def test_they_log_the_same_validation(folder, name, other):
    sharded, alone = (evaluations(folder / run) for run in (name, other))
    assert len(alone) == 2
    assert {"val/seen/loss", "val/unseen/loss", "val/seen/accuracy_worst_decile"} < alone[0].keys()
    for together, expected in zip(sharded, alone, strict=True):
        assert together == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sixteen_bits_come_close(folder, precision):
    name = f"two_{precision}"
    assert {weight.dtype for weight in checkpoint(last(folder, name))["state_dict"].values()} == {torch.float32}
    rough, exact = (evaluations(folder / run)[-1]["val/seen/loss"] for run in (name, "one"))
    assert rough == pytest.approx(exact, rel=0.05)


def test_they_write_the_same_table_of_users(folder):
    sharded, alone = (rows_of(folder / run / "version_0/users_seen.csv") for run in ("two", "one"))
    assert [(row["user_id"], row["pairs"], row["accuracy"]) for row in sharded] == [
        (row["user_id"], row["pairs"], row["accuracy"]) for row in alone
    ]


@pytest.mark.parametrize("name", ["two_small", "ddp_small"])
def test_a_process_without_a_row_takes_part_in_validation(folder, name):
    (together,), (alone,) = (evaluations(folder / run) for run in (name, "one_small"))
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_a_checkpoint_holds_what_was_trained_whole_and_no_more(folder):
    module = load_module(last(folder, "two"), "checkpoint")
    trained = {name: param.shape for name, param in module.named_parameters() if param.requires_grad}
    assert {name: weight.shape for name, weight in checkpoint(last(folder, "two"))["state_dict"].items()} == trained
    assert sum("lora_B" in name for name in trained) > 0
    assert all(param.abs().max() > 0 for name, param in module.named_parameters() if "lora_B" in name)


def predictions(folder: Path) -> list[tuple[str, str, str]]:
    lines = [line for path in folder.glob("version_0/predictions*.jsonl") for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return sorted((row["user_id"], row["prompt"], row["completion"]) for row in rows)


def test_they_write_the_same_completions(folder):
    sharded, alone = (predictions(folder / run) for run in ("two_predict", "one_predict"))
    assert len(alone) == 8
    assert len({completion for *_, completion in alone}) > 1
    assert sharded == alone


def test_the_exported_model_writes_what_the_sharded_one_does(folder, tmp_path):
    export(last(folder, "two"), tmp_path)
    module = load_module(last(folder, "two"), "checkpoint")
    module.policy.model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for user_id, prompt, completion in predictions(folder / "two_predict"):
        ids = module.policy.tokenizer(prompt)["input_ids"]
        assert module.generate(Tokens.from_lists([ids]), [user_id], sampling=GREEDY) == [completion]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("override", ["fsdp.yaml", "fsdp2.yaml"])
def test_the_configurations_train_on_all_gpus(tmp_path, override):
    config = write_config(tmp_path)
    words = [sys.executable, "-m", "prlhf_lightning", "fit", "-c", config, "-c", OVERRIDES / override]
    words += ["--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:3]))}
    subprocess.run(list(map(str, words)), env=environment, check=True, timeout=SECONDS)
    weights = checkpoint(tmp_path / "version_0/checkpoints/last.ckpt")["state_dict"]
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in weights.items())
    assert all(weight.isfinite().all() for weight in weights.values())
