r"""Cold-start curve on real people: users of Jester who were held out of training, adapted from their first pairs.

    python -m prlhf_lightning fit --config configs/from_scratch.yaml --data.unseen_user_fraction 0.2 \
        --data.source.train train.jsonl.gz --data.source.validation validation.jsonl.gz
    python benchmarks/cold_start_jester.py --checkpoint runs/version_0/checkpoints/last.ckpt \
        --train train.jsonl.gz --validation validation.jsonl.gz

New users are those in the files of whom the checkpoint knows nothing: their training pairs are what they are adapted
from, and their validation pairs, about other jokes, are what is measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from reporting import about, tell

from prlhf_lightning.adaptation import cold_start, fit_prior, select_pairs, trained_rows
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.data.tokenization import TokenizationSettings
from prlhf_lightning.tasks.checkpoints import load_module
from prlhf_lightning.tasks.pair_batches import read_pairs
from prlhf_lightning.types import PreferenceBatch


def of_users(pairs: PreferenceBatch, user_ids: set[str], most: int) -> PreferenceBatch:
    """Return up to `most` pairs of each of some users, drawn once and for all, each user's side by side."""
    places = defaultdict(list)
    for place in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist():
        if pairs.user_ids[place] in user_ids and len(places[pairs.user_ids[place]]) < most:
            places[pairs.user_ids[place]].append(place)
    return select_pairs(pairs, torch.tensor([place for own in places.values() for place in own]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--kinds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_module(args.checkpoint, "checkpoint").eval()
    settings = TokenizationSettings(96, 96, 96)
    train, validation = (read_pairs(model, path, settings)[0] for path in (args.train, args.validation))
    known = set(model.vocabulary.ids) if model.vocabulary else set()
    new = set(train.user_ids) - known
    pairs, held_out = of_users(train, new, 30), of_users(validation, new, 100)
    rows, generic = trained_rows(model)
    own = of_users(validation, known, 5)
    place = {user_id: number for number, user_id in enumerate(model.vocabulary.ids if model.vocabulary else ())}
    margins_of = Margins(model, own)
    trained = (margins_of(rows[[place[user_id] for user_id in own.user_ids]])[0] > 0).float().mean()
    by_generic = (margins_of(generic)[0] > 0).float().mean()
    prior = fit_prior(model, pairs, args.kinds)
    points = cold_start(model, pairs, held_out, prior=prior, steps=args.steps)
    lines = ["| pairs | new users | accuracy | generic user | gain (95%) |", "|---|---|---|---|---|"]
    lines += [
        f"| {p.pairs} | {p.users} | {p.accuracy:.4f} | {p.generic:.4f} | {p.gain:+.4f} ± {p.interval:.4f} |"
        for p in points
    ]
    lines.append(
        f"\nTrained users, up to 5 validation pairs each ({len(own)}): own row {trained:.4f}, generic {by_generic:.4f}."
    )
    tell(f"{about()}.\n\n" + "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
