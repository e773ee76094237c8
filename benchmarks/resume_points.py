"""Breaks training off at chosen points, goes on, and compares the end with that of a run in peace, bit by bit.

    OMP_NUM_THREADS=1 python benchmarks/resume_points.py                     # all configurations, 12 points each
    OMP_NUM_THREADS=1 python benchmarks/resume_points.py --points 0          # every point
    OMP_NUM_THREADS=1 python benchmarks/resume_points.py --only accumulated validated_in_accumulation

A point is any moment at which Lightning calls a callback: before and after each micro-batch (inside an accumulation as
well), after each batch of a validation, after a validation, at an epoch's end. At each point the run is broken off
once as by Ctrl+C pressed twice, which leaves `interrupted.ckpt`, and once as by `kill -9`, which leaves the last
checkpoint of every second step; every third run is broken off a second time, at a later point. What a run ends with
must be that of the run in peace: weights, optimizer, schedule, number of steps, the best checkpoint's step and value,
and which rows each batch had. Real kills of processes, at random moments, are in `kill_resume.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kill_resume import distance
from lightning.pytorch import Callback, LightningModule, Trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import BCOLoss, DPOLoss, KTOLoss, PreferenceLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.callbacks.outputs import BestAndLast, SaveOnInterrupt
from prlhf_lightning.user_models import AmortizedUserModel, ClusterUserModel, IndividualUserModel, UserModel

MODEL = "builtin:byte-lm"
POINTS = ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_end", "on_validation_end"]
POINTS += ["on_train_epoch_end", "on_train_end"]


@dataclass(frozen=True)
class Configuration:
    """What differs from the plain run of two epochs."""

    user_model: type[UserModel] = IndividualUserModel
    users: dict[str, Any] = field(default_factory=lambda: {"num_tokens": 2})
    loss: type[PreferenceLoss] = DPOLoss
    lora: LoRA | None = LoRA(rank=2, dropout=0.1)  # noqa: RUF009 - frozen; the random state must be resumed as well
    sample_terms: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


CONFIGURATIONS = {
    "plain": Configuration(),
    "accumulated": Configuration(trainer={"accumulate_grad_batches": 3}),
    "accumulated_sampled": Configuration(trainer={"accumulate_grad_batches": 3}, sample_terms=True),
    "streamed": Configuration(data={"streaming": True, "shuffle_buffer": 8, "validation_fraction": 0.0}),
    "workers": Configuration(data={"num_workers": 1}),
    "kto": Configuration(loss=KTOLoss, data={"feedback": "thumbs"}, trainer={"accumulate_grad_batches": 2}),
    "bco": Configuration(loss=BCOLoss, trainer={"accumulate_grad_batches": 3}),
    "amortized": Configuration(AmortizedUserModel, {"num_tokens": 2, "rank": 2, "num_pairs": 3}),
    "full": Configuration(ClusterUserModel, {"num_clusters": 2, "num_tokens": 2}, lora=None),
    "full_bf16": Configuration(lora=None, trainer={"precision": "bf16-true"}),
    "bucketed": Configuration(data={"max_tokens_per_batch": 300}, trainer={"accumulate_grad_batches": 2}),
    "by_user": Configuration(data={"pairs_per_user": 2, "balance": 0.5}),
    "validated_in_epoch": Configuration(trainer={"val_check_interval": 2}),
    "validated_in_accumulation": Configuration(trainer={"val_check_interval": 4, "accumulate_grad_batches": 3}),
    "validated_across_epochs": Configuration(trainer={"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "never_validated": Configuration(trainer={"limit_val_batches": 0}),
    "limited": Configuration(trainer={"max_steps": 9}),
}


class BrokenOff(Exception):
    """Ends a run."""


class Break(Callback):
    """Counts the points of a run, and breaks it off at one."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def _point(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        self.count += 1
        if self.count == self.at:
            raise BrokenOff

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "_point" if name in POINTS else name)


class Watched(PersonalizedLM):
    """Notes which rows each batch has."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note a batch, in place of one that was broken off."""
        super().on_train_batch_start(batch, batch_idx)
        self.rows[self.current_epoch, batch_idx] = batch.records.tolist()

    rows: dict[tuple[int, int], list[int]]


def write_rows(folder: Path) -> None:
    """Write votes and thumbs."""
    draw = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "thumbs.jsonl").open("w") as thumbs:
        for number in range(26):
            row: dict[str, Any] = {
                "user_id": f"u{number % 4}",
                "prompt": draw.choice("abcdefgh") * draw.randrange(1, 9),
            }
            long, short = ("".join(draw.choices("xyz", k=k)) for k in (7, 3))
            pairs.write(json.dumps(row | {"chosen": long, "rejected": short}) + "\n")
            thumbs.write(json.dumps(row | {"completion": long, "label": bool(number % 2)}) + "\n")


def run(
    configuration: Configuration, root: Path, folder: Path, *callbacks: Callback, checkpoint: Path | None
) -> Watched:
    """Train, from a checkpoint if one is given."""
    torch.manual_seed(0)
    c = configuration
    policy = CausalLMPolicy(MODEL, lora=c.lora, random_init=0)
    optim = Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0)
    module = Watched(c.user_model(**c.users), policy, c.loss(), optim=optim, sample_terms=c.sample_terms)
    module.rows = {}
    data: dict[str, Any] = {"batch_size": 3, "validation_fraction": 0.2, "cache_dir": root / "cache", **c.data}
    rows = root / ("thumbs.jsonl" if data.get("feedback") == "thumbs" else "pairs.jsonl")
    size = module.user_model.history_size
    datamodule = PreferenceDataModule(FileSource(str(rows)), policy.tokenizer, history_size=size, **data)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[BestAndLast(every_n_train_steps=2), *callbacks],
        **{"max_epochs": 2, **c.trainer},
    )
    trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    return module


def result(module: Watched) -> dict[str, Any]:
    """Return what a run ended with."""
    trainer = module.trainer
    content = trainer._checkpoint_connector.dump_checkpoint(False)
    best: Any = trainer.checkpoint_callback
    score = best.best_model_score
    return {
        **{key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")},
        "best": None if score is None else (Path(best.best_model_path).name, score.cpu()),
    }


def broken_off(
    configuration: Configuration, root: Path, folder: Path, at: list[int], killed: bool
) -> tuple[Watched, dict[tuple[int, int], list[int]]]:
    """Break a run off at points, go on each time, and return the last and the rows of all batches."""
    rows: dict[tuple[int, int], list[int]] = {}
    checkpoint = None
    for point in [*at, None]:
        callbacks = [Break(point), *([] if killed else [SaveOnInterrupt()])]
        modules: list[Watched] = []

        class Keep(Callback):
            def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
                modules.append(pl_module)  # type: ignore[arg-type]  # noqa: B023

        try:
            module = run(configuration, root, folder, Keep(), *callbacks, checkpoint=checkpoint)
        except BrokenOff:
            files = list((folder / "checkpoints").glob("*.ckpt"))
            checkpoint = max(files, key=lambda path: path.stat().st_mtime_ns) if files else None
            if checkpoint is not None:
                _, place = _place(checkpoint)
                rows.update({key: value for key, value in modules[0].rows.items() if key < place})
            continue
        rows.update(module.rows)
        return module, rows
    raise AssertionError("not broken off, and not ended")


def _place(checkpoint: Path) -> tuple[int, tuple[int, int]]:
    content = checkpoint_files.load(checkpoint)
    place = content["prlhf_lightning"]["place"]
    return content["global_step"], (place["epoch"], place["batch"])


def measure(names: list[str], points: int, seed: int, root: Path) -> Iterator[str]:
    """Try configurations; yield what went wrong."""
    write_rows(root)
    draw = random.Random(seed)
    for name in names:
        configuration = CONFIGURATIONS[name]
        counter = Break()
        straight = run(configuration, root, root / name, counter, checkpoint=None)
        expected = result(straight)
        chosen = list(range(1, counter.count + 1))
        if 0 < points < len(chosen):
            chosen = sorted(draw.sample(chosen, points))
        wrong = []
        for number, point in enumerate(chosen):
            at = [point, *([draw.randrange(1, 9)] if number % 3 == 0 else [])]
            for killed in (False, True):
                folder = root / f"{name}-{point}-{killed}"
                module, rows = broken_off(configuration, root, folder, at, killed)
                found = result(module)
                other = [key for key, value in expected.items() if distance(found[key], value) > 0]
                other += ["rows"] if rows != straight.rows else []
                if other:
                    wrong.append(f"{name}: {'killed' if killed else 'interrupted'} at {at}: {', '.join(other)} differ")
                shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: {counter.count} points, {len(chosen)} tried twice: {len(wrong)} ended differently", flush=True)
        yield from wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--points", type=int, default=12, help="of each configuration; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for log in ("lightning.pytorch", "prlhf_lightning"):
        logging.getLogger(log).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as place:
        os.environ["PRLHF_CACHE"] = str(Path(place) / "cache")
        mistakes = list(measure(arguments.only, arguments.points, arguments.seed, Path(place)))
    print("\n".join(mistakes))
    sys.exit(bool(mistakes))
