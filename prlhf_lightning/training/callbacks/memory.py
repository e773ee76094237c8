"""Out-of-memory errors: a note with the batch and with settings that need less memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.training import OnlineRL, PersonalizedLM
from prlhf_lightning.training.micro_batch import describe_row
from prlhf_lightning.types import PreferenceBatch

_NAMED = 3  # rows
_LARGE = 0.5  # share of all weights from which a user table is mentioned
_GIB = 2**30
#: Messages of libraries without a separate exception for it.
_SAYINGS = re.compile(r"out of memory|(can't allocate|not enough) memory|ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory of a device, or of the host, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAYINGS.search(str(error)) is not None


class ExplainOutOfMemory(Callback):
    """Adds to an out-of-memory error the batch and, in order, the settings that need less memory."""

    def __init__(self) -> None:
        self._batch: PreferenceBatch | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember the batch."""
        self._batch = batch

    on_test_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add a note to the error; it ends the traceback and is all that the command line prints."""
        if is_out_of_memory(exception) and isinstance(pl_module, PersonalizedLM):
            # Tensors on the host need no device memory.
            batch = self._batch.to("cpu") if self._batch is not None and len(self._batch) else None
            exception.add_note(" ".join([*_what_happened(trainer, batch), _what_to_do(trainer, pl_module)]))


def _what_happened(trainer: Trainer, batch: PreferenceBatch | None) -> Iterator[str]:
    during = "training" if trainer.training else "validation" if trainer.validating else "this command"
    if batch is None:
        yield f"Memory ran out in {during}."
        return
    yield f"Memory ran out in {during}, in or after a batch of {len(batch)} pairs:"
    parts = {"user text": batch.user_text, "prompt": batch.prompt, "chosen": batch.chosen, "rejected": batch.rejected}
    widths = ", ".join(f"{name} {part.ids.shape[1]}" for name, part in parts.items() if part.ids.shape[1])
    yield f"tokens up to {widths}."
    longer = torch.maximum(batch.chosen.mask.sum(1), batch.rejected.mask.sum(1))
    lengths: list[int] = (batch.user_text.mask.sum(1) + batch.prompt.mask.sum(1) + longer).tolist()
    longest = sorted(range(len(batch)), key=lambda row: -lengths[row])[:_NAMED]
    named = [f"{describe_row(trainer, int(batch.records[row]))} ({lengths[row]} tokens)" for row in longest]
    yield f"Longest: {', '.join(named)}."


def _what_to_do(trainer: Trainer, module: PersonalizedLM) -> str:
    """Return settings that need less memory, starting with those that do not change what is learned."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    policy = module.policy
    advice = []
    rows = sum(table.numel() for table in module.user_model.row_tables())
    if rows > _LARGE * sum(param.numel() for param in module.parameters()):
        # A float32 weight, and with AdamW's two averages three times that in training.
        advice.append(
            f"the table of {module.user_model.row_tables()[0].shape[0] - 1:,} users is the large part (with its "
            f"optimiser's state {rows * 12 / _GIB:.2f} GiB): use ClusterUserModel, or a smaller num_tokens"
        )
    if isinstance(module, OnlineRL):
        advice.append(
            f"lower model.micro_batch_size ({module.micro_batch_size}) and model.sampling_batch_size "
            f"({module.sampling_batch_size}): the same steps"
        )
        advice.append(f"lower model.sampling.max_new_tokens ({module.sampling.max_new_tokens})")
    else:
        advice += _about_batches(trainer, data)
    if isinstance(policy, CausalLMPolicy):
        if not policy.gradient_checkpointing and trainer.training:
            advice.append("model.policy.gradient_checkpointing true")
        if policy.lora is None and trainer.training:
            advice.append("model.policy.lora, with which not all weights are trained")
        if policy.dtype in ("auto", "float32") and next(policy.parameters()).dtype == torch.float32:
            advice.append("model.policy.dtype bfloat16")
    return f"Try in this order: {'; '.join(advice)}."


def _about_batches(trainer: Trainer, data: Any) -> Iterator[str]:
    size, accumulate = getattr(data, "batch_size", 1), trainer.accumulate_grad_batches
    if not trainer.training:
        yield f"lower data.eval_batch_size ({getattr(data, 'eval_batch_size', 1)})"
    elif size > 1:
        half = max(1, size // 2)
        yield (
            f"data.batch_size {half} with trainer.accumulate_grad_batches {accumulate * -(-size // half)} "
            f"(now {size} and {accumulate}): the same steps"
        )
    budget = getattr(data, "max_tokens_per_batch", None)
    yield f"lower data.max_tokens_per_batch ({budget})" if budget else "data.max_tokens_per_batch, which bounds a batch"
    yield f"lower data.max_completion_length{_limit(data, 'completion')} or data.max_prompt_length"


def _limit(data: Any, what: str) -> str:
    settings = getattr(data, "settings", None)
    return f" ({getattr(settings, f'max_{what}_length')})" if settings is not None else ""
