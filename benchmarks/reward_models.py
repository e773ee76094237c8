r"""Reward models on real people: accuracy on held-out pairs, new texts and new people, by seed.

    python benchmarks/reward_models.py --backbone MiniLM --train train.jsonl.gz --validation validation.jsonl.gz \
        --new_texts new_statements.jsonl.gz --adapt new_people_adapt.jsonl.gz --adapt_test new_people_test.jsonl.gz

Files have the columns `user_id`, `prompt`, `chosen` and `rejected`. Texts are embedded once, into the cache. "Generic"
is the same model's generic user; "none" is a model trained without users. Gains are in points of accuracy, means over
people with 1.96 standard errors over people; all are means over seeds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from statistics import mean

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from reporting import about
from torch import Tensor

from prlhf_lightning.data import FileSource
from prlhf_lightning.rewards import JudgedPairs, RewardBackbone
from prlhf_lightning.training import PersonalizedRewardModel, RewardDataModule
from prlhf_lightning.user_models import LowRankUserModel, UniformUserModel, UserModel

COUNTS = (2, 10, 30)


def read(path: str, tokenizer: object) -> JudgedPairs:
    """Return the pairs of a file."""
    source = FileSource(path)
    return RewardDataModule(source, tokenizer, ties="drop", validation_fraction=0.0).training_pairs()  # type: ignore[arg-type]


def fit(user_model: UserModel, backbone: RewardBackbone, data: RewardDataModule, seed: int) -> PersonalizedRewardModel:
    """Return a model fitted to the training pairs."""
    seed_everything(seed, verbose=False)
    module = PersonalizedRewardModel(user_model, backbone)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    return module


def scores(margins: Tensor) -> np.ndarray:
    """Return 1 for each correctly ranked pair, 0.5 for a tie, 0 otherwise."""
    return ((margins.sign() + 1) / 2).double().numpy()


def gain(own: np.ndarray, other: np.ndarray, users: tuple[str, ...]) -> tuple[float, float]:
    """Return the mean over people of the gain in points, and 1.96 standard errors."""
    by_user = defaultdict(list)
    for user, difference in zip(users, own - other, strict=True):
        by_user[user].append(difference)
    means = 100 * np.array([np.mean(values) for values in by_user.values()])
    return float(means.mean()), 1.96 * float(means.std()) / len(means) ** 0.5


def margins(model: PersonalizedRewardModel, pairs: JudgedPairs, generic: bool = False) -> Tensor:
    """Return the margins of pairs under their users."""
    features, rows = model.features_of(pairs.texts), model.rows_of(pairs.user_ids)
    chosen, rejected = (model.rewards(features, rows, texts, generic) for texts in (pairs.chosen, pairs.rejected))
    return chosen - rejected


def first_pairs(pairs: JudgedPairs, count: int) -> JudgedPairs:
    """Return the first pairs of each user."""
    seen: dict[str, int] = defaultdict(int)
    rows = []
    for row, user in enumerate(pairs.user_ids):
        seen[user] += 1
        if seen[user] <= count:
            rows.append(row)
    index = torch.tensor(rows)
    return replace(
        pairs,
        user_ids=tuple(pairs.user_ids[row] for row in rows),
        chosen=pairs.chosen[index],
        rejected=pairs.rejected[index],
    )


def new_people(
    model: PersonalizedRewardModel, adapt: JudgedPairs, test: JudgedPairs, count: int
) -> tuple[float, float]:
    """Return the gain of new people over the generic user after so many pairs."""
    users, codes, _ = model.new_users(first_pairs(adapt, count))
    known = model.features_of(test.texts).scores(torch.cat([model.user_model.generic_prompt, model.user_model.basis]).T)
    difference = known[test.chosen] - known[test.rejected]
    own = difference[:, 0] + (difference[:, 1:] * codes[users.rows(test.user_ids)]).sum(1)
    return gain(scores(own.detach()), scores(difference[:, 0].detach()), test.user_ids)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--new_texts")
    parser.add_argument("--adapt")
    parser.add_argument("--adapt_test")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(about(), flush=True)
    backbone = RewardBackbone(given.backbone)
    data = RewardDataModule(FileSource(given.train, given.validation), backbone.tokenizer, ties="drop")
    sets = {"validation": read(given.validation, backbone.tokenizer)}
    if given.new_texts:
        sets["new texts"] = read(given.new_texts, backbone.tokenizer)
    people = [read(path, backbone.tokenizer) for path in (given.adapt, given.adapt_test) if path]
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for seed in range(given.seeds):
        none = fit(UniformUserModel(num_tokens=1), backbone, data, seed)  # embeds the texts in the first round
        begun = time.process_time()
        model = fit(LowRankUserModel(num_tokens=1, rank=given.rank), backbone, data, seed)
        found["CPU seconds of a fit, texts embedded"].append((time.process_time() - begun,))
        for name, pairs in sets.items():
            own, generic, alone = (
                scores(found) for found in (margins(model, pairs), margins(model, pairs, True), margins(none, pairs))
            )
            for kind, values in (("own", own), ("generic", generic), ("none", alone)):
                found[f"{name}: accuracy, {kind}"].append((float(values.mean()),))
            found[f"{name}: gain over generic"].append(gain(own, generic, pairs.user_ids))
            found[f"{name}: gain over none"].append(gain(own, alone, pairs.user_ids))
        if len(people) == 2:
            for count in COUNTS:
                found[f"new people: gain after {count} pairs"].append(new_people(model, *people, count))
        print(f"seed {seed} done", flush=True)
    for label, rows in found.items():
        values = [mean(column) for column in zip(*rows, strict=True)]
        each = ", ".join(f"{row[0]:.4f}" if abs(row[0]) < 1 else f"{row[0]:.2f}" for row in rows)
        print(f"| {label} | {values[0]:.4f}{f' ± {values[1]:.2f}' if len(values) > 1 else ''} | {each} |")


if __name__ == "__main__":
    main()
