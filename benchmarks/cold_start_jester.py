r"""Cold-start curve on real people: users of Jester who were held out of training, adapted from their first pairs.

    python -m prlhf_lightning fit --config benchmarks/jester.yaml
    python benchmarks/cold_start_jester.py --checkpoint runs/version_0/checkpoints/last.ckpt \
        --train train.jsonl.gz --validation validation.jsonl.gz

New users are those in the files of whom the checkpoint knows nothing: their training pairs are what they are adapted
from, and their validation pairs, about other jokes, are what is measured. Each is adapted several times, from other
ones of their pairs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from reporting import about, tell
from rich.progress import track

from prlhf_lightning.adaptation import cold_start, fit_prior, select_pairs, trained_rows
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.cli.adapt import read_pairs
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.data import FileSource
from prlhf_lightning.types import PreferenceBatch


def of_users(pairs: PreferenceBatch, user_ids: set[str], most: int, draw: int = 0) -> PreferenceBatch:
    """Return up to `most` pairs of each of some users, drawn with a seed, each user's side by side."""
    places = defaultdict(list)
    for place in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(draw)).tolist():
        if pairs.user_ids[place] in user_ids and len(places[pairs.user_ids[place]]) < most:
            places[pairs.user_ids[place]].append(place)
    return select_pairs(pairs, torch.tensor([place for own in places.values() for place in own]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--kinds", type=int, help="by default, as many as predict trained users best")
    parser.add_argument("--steps", type=int, help="by default, as `adapt`")
    parser.add_argument("--draws", type=int, default=5, help="times that each new user is adapted, from other pairs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_module(args.checkpoint, "checkpoint").eval()
    train, validation = (read_pairs(model, FileSource(path))[0] for path in (args.train, args.validation))
    known = set(model.vocabulary.ids) if model.vocabulary else set()
    new = set(train.user_ids) - known
    held_out = of_users(validation, new, 100)
    rows, generic = trained_rows(model)
    own = of_users(validation, known, 5)
    place = {user_id: number for number, user_id in enumerate(model.vocabulary.ids if model.vocabulary else ())}
    margins_of = Margins(model, own)
    trained = (margins_of(rows, torch.tensor([place[user_id] for user_id in own.user_ids])) > 0).float().mean()
    by_generic = (margins_of(generic) > 0).float().mean()
    prior = None if model.user_model.history_size else fit_prior(model, of_users(train, new, 30), args.kinds)
    curves = [
        cold_start(model, of_users(train, new, 30, draw), held_out, prior=prior, steps=args.steps)
        for draw in track(range(args.draws), "Adapting")
    ]
    lines = ["| pairs | new users | accuracy | generic user | gain (95%) |", "|---|---|---|---|---|"]
    for points in zip(*curves, strict=True):
        accuracy, generic_accuracy, gain, interval = (
            mean(getattr(point, name) for point in points) for name in ("accuracy", "generic", "gain", "interval")
        )
        lines.append(
            f"| {points[0].pairs} | {points[0].users} | {accuracy:.4f} | {generic_accuracy:.4f} | "
            f"{gain:+.4f} ± {interval:.4f} |"
        )
    lines.append(
        f"\nMeans of {args.draws} draws of each user's pairs; the intervals, which are over users, of one draw each.\n"
        f"Trained users, up to 5 validation pairs each ({len(own)}): own row {trained:.4f}, generic {by_generic:.4f}."
    )
    tell(f"{about()}.\n\n" + "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
