"""Memory that runs out: the batch and the settings that need less are named."""

from __future__ import annotations

import sys

import pytest
import torch
from short_runs import run_config, write_config

from prlhf_lightning.cli.main import main
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.training.callbacks import is_out_of_memory

SAID_BY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID_BY, ids=str)
def test_what_libraries_say_is_understood(error):
    assert is_out_of_memory(error)


def test_the_allocator_of_the_cpu_says_what_is_looked_for():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


class Hungry(DPOLoss):
    """Asks for more memory than there is, in the third batch of training or in validation."""

    def __init__(self, beta: float = 0.1, sft_weight: float = 0.0, when: str = "train") -> None:
        super().__init__(beta, sft_weight)
        self.when, self.calls = when, 0

    def pair_loss(self, policy, reference):
        self.calls += self.training
        if self.calls > 4 and self.training == (self.when == "train"):
            torch.empty(2**60)
        return super().pair_loss(policy, reference)


@pytest.fixture
def config(model_path, votes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_losses", sys.modules[__name__])
    monkeypatch.setattr(Hungry, "__module__", "my_losses")
    content = run_config(
        tmp_path,
        {"model": model_path, "lora": {"rank": 2}},
        votes,
        model={"loss": {"class_path": "my_losses.Hungry"}},
        data={"validation_fraction": 0.2},
    )
    return write_config(tmp_path, content)


def said(*args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert isinstance(stop.value.code, str)
    assert stop.value.code.count("\n") == 0
    return stop.value.code


def test_a_training_batch_and_its_settings_are_named(config, tmp_path):
    text = said("fit", "-c", config, "--data.batch_size", 6, "--trainer.accumulate_grad_batches", 2)
    assert "Memory ran out in training, in or after a batch of 6 pairs: tokens up to user text 4, prompt 4" in text
    assert "votes.jsonl:" in text
    assert "(14 tokens)" in text  # four of user text, BOS and three of prompt, five and EOS of completion
    order = [
        "data.batch_size 3 with trainer.accumulate_grad_batches 4 (now 6 and 2)",
        "data.max_tokens_per_batch",
        "data.max_completion_length (512)",
        "gradient_checkpointing true",
        "model.policy.dtype bfloat16",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "ClusterUserModel" not in text
    assert list((tmp_path / "runs").glob("*/checkpoints/interrupted.ckpt"))


def test_a_validation_batch_is_named_and_what_helps_there(config):
    text = said("fit", "-c", config, "--model.loss.when", "validate")
    assert "Memory ran out in validation" in text
    assert "data.eval_batch_size" in text
    assert "gradient_checkpointing" not in text


def test_a_table_that_is_the_large_part_is_named_first(config):
    text = said("fit", "-c", config, "--model.user_model.num_tokens", 500)
    assert "Try in this order: the table of 4 users is the large part" in text
