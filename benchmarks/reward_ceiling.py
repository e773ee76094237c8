r"""Reward models of simulated users: accuracy on held-out pairs relative to the ceiling of noisy labels, by seed.

    python benchmarks/reward_ceiling.py

Each seed draws other users, pairs and starting weights. The ceiling is the accuracy of the true utilities on the same
labels. The first setting of each list is that of `configs/reward.yaml`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time

from lightning.pytorch import Trainer, seed_everything
from reporting import about

from prlhf_lightning.data import SimulatedSource
from prlhf_lightning.rewards import RewardBackbone
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule
from prlhf_lightning.user_models import LowRankUserModel


def measure(pooling: str, precision: float | None, pairs: int, seed: int) -> tuple[float, float, float, float]:
    """Return accuracy, the same of the generic user, the ceiling, and the CPU seconds of a fit without embedding."""
    backbone = RewardBackbone("builtin:style-lm", pooling)  # type: ignore[arg-type]
    source = SimulatedSource(20, pairs, 40, 10, seed=seed)
    data = RewardDataModule(source, backbone.tokenizer, max_prompt_length=64, max_completion_length=64)
    seed_everything(seed, verbose=False)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    for _ in range(2):  # texts are embedded in the first round
        begun = time.process_time()
        module = PersonalizedRewardModel(LowRankUserModel(num_tokens=1, rank=8), backbone, precision=precision)
        trainer = Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet)
        trainer.fit(module, data)
    values = [float(trainer.callback_metrics[f"val/seen/{name}"]) for name in ("accuracy", "generic_accuracy")]
    return values[0], values[1], source.noise_ceiling(), time.process_time() - begun


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poolings", nargs="+", default=["mean", "last"])
    parser.add_argument("--precisions", type=float, nargs="+", default=[3.0, 0.0], help="0: chosen by the fit")
    parser.add_argument("--pairs", type=int, nargs="+", default=[150])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(about())
    print("| pooling | precision | pairs a user | of the ceiling | accuracy | generic user | ceiling | CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for pooling, precision, pairs in itertools.product(given.poolings, given.precisions, given.pairs):
        found = [measure(pooling, precision or None, pairs, seed) for seed in range(given.seeds)]
        shares = [accuracy / ceiling for accuracy, _, ceiling, _ in found]
        accuracy, generic, ceiling, seconds = (statistics.mean(column) for column in zip(*found, strict=True))
        cells = (
            pooling,
            f"{precision:g}" if precision else "chosen",
            str(pairs),
            f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})",
            *(f"{value:.3f}" for value in (accuracy, generic, ceiling)),
            f"{seconds:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
