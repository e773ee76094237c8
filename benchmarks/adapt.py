"""What a few pairs of a new simulated user are worth to the quickstart's model, and how long adapting takes.

    python benchmarks/adapt.py --checkpoint runs/version_0/checkpoints/last.ckpt

The new users' tastes are drawn as those of the quickstart are; they judge training prompts, and utility is taken over
what is written for held-out ones. Prints a Markdown table and, with `--out`, writes it to a file.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from reporting import about, tell
from torch import Tensor

from prlhf_lightning import PersonalizedLM, PreferenceBatch, SimulatedSource, UserVocabulary
from prlhf_lightning.adaptation import Margins, adapt_users, fit_prior, trained_rows
from prlhf_lightning.cli.models import load_module
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.types import Tokens

COUNTS = (0, 2, 5, 10, 20, 30, 60)
TESTED = 20


class Simulation:
    """New users of the quickstart's model, their pairs, and their judgment of what is written for them."""

    def __init__(self, model: PersonalizedLM, users: int, trained: int = 20) -> None:
        self.model = model
        self.source = SimulatedSource(
            num_users=trained, pairs_per_user=450, validation_pairs_per_user=TESTED, num_unseen_users=users
        )
        self._tokenize = FeedbackTokenizer(model.policy.tokenizer, TokenizationSettings(64, 64))
        self.prompts = self.source.eval_prompts()

    def pairs(self, count: int, split: str = "train", users: int | None = None) -> PreferenceBatch:
        """Return the first pairs of each new user."""
        new = self.source.unseen_users[:users]
        pairs = [pair for user in new for pair in islice(self.source._pairs(split, user), count)]
        rows = [
            {"user_id": p.user.user_id, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs
        ]
        records = [parse_record(row, "simulated") for row in rows]
        names = ("user_text", "prompt", "chosen", "rejected")
        tokenized = self._tokenize(records, ["simulated"] * len(records))
        return collate(
            [
                {"user_id": record.user_id, "record": place} | {f"{n}_ids": getattr(ids, n) for n in names}
                for place, (record, ids) in enumerate(zip(records, tokenized, strict=True))
            ]
        )

    def utilities(self, user_ids: list[str], rows: Tensor) -> tuple[Tensor, float]:
        """Write for each user with their row; return each one's mean utility, and the share of well-formed answers."""
        model, (table,) = self.model, self.model.user_model.row_tables()
        kept, vocabulary = table.data, model.vocabulary
        table.data, model.vocabulary = torch.cat([kept[:1], rows]), UserVocabulary(user_ids)
        verdicts = []
        for start in range(0, len(user_ids), 16):
            some = user_ids[start : start + 16]
            asked = [(user_id, prompt) for user_id in some for prompt in self.prompts]
            ids = self._tokenize.prompts([prompt for _, prompt in asked])
            texts = model.generate(Tokens.from_lists([row.tolist() for row in ids]), [user_id for user_id, _ in asked])
            verdicts += [self.source.judge(*request, text) for request, text in zip(asked, texts, strict=True)]
        table.data, model.vocabulary = kept, vocabulary
        means = torch.tensor([verdict.utility for verdict in verdicts]).view(len(user_ids), -1).mean(1)
        return means, sum(verdict.well_formed for verdict in verdicts) / len(verdicts)


def gradient_descent(model: PersonalizedLM, pairs: PreferenceBatch, users: int, steps: int = 40) -> Tensor:
    """Train the rows of new users by AdamW from the generic row, without a prior, as training itself does."""
    _, generic = trained_rows(model)
    rows = generic.repeat(users, 1).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=3e-2, weight_decay=0.0)
    of_pair = torch.arange(users).repeat_interleave(len(pairs) // users)
    margins_of, every = Margins(model, pairs), torch.eye(len(generic))
    for _ in range(steps):
        margins, slopes = margins_of.along(every, rows.detach(), of_pair)
        rows.grad = torch.zeros_like(rows).index_add(0, of_pair, -(-margins).sigmoid()[:, None] * slopes)
        rows.grad /= len(pairs) / users
        optimizer.step()
    return rows.detach()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the quickstart, seed 0")
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--trained", type=int, default=10, help="users who are also trained by gradient descent")
    parser.add_argument("--crowd", type=int, default=1000, help="users adapted in one batch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_module(args.checkpoint, "checkpoint").eval()
    world = Simulation(model, args.users)
    new = [user.user_id for user in world.source.unseen_users]
    held_out, of_held_out = world.pairs(TESTED, "validation"), torch.arange(args.users).repeat_interleave(TESTED)
    margins_of = Margins(model, held_out)
    rows, generic = trained_rows(model)
    prior = fit_prior(model, world.pairs(2))
    without, _ = world.utilities(new, generic.repeat(args.users, 1))
    seen, _ = world.utilities([user.user_id for user in world.source.seen_users], rows)
    lines = [
        "| pairs | utility | lowest of a user | well-formed | pair accuracy | gain in utility (95%) |",
        "|---" * 6 + "|",
    ]
    by_count = {}
    for count in COUNTS:
        found = adapt_users(model, world.pairs(count), new, prior) if count else None
        own = found.rows if found else generic.repeat(args.users, 1)
        utility, well_formed = world.utilities(new, own)
        accuracy = (margins_of(own, of_held_out) > 0).float().mean()
        gain = utility - without
        by_count[count] = utility
        print(f"{count} pairs: utility {utility.mean():.3f}, accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
        lines.append(
            f"| {count} | {utility.mean():.3f} | {utility.min():.3f} | {well_formed:.3f} | {accuracy:.3f} | "
            f"{gain.mean():+.3f} ± {1.96 * gain.std() / args.users**0.5:.3f} |"
        )
    trained = gradient_descent(model, world.pairs(60, users=args.trained), args.trained)
    by_descent, _ = world.utilities(new[: args.trained], trained)
    same = by_count[10][: args.trained].mean()
    lines += [
        "",
        f"Trained users (450 pairs each): utility {seen.mean():.3f}; 10 pairs of a new user reach "
        f"{by_count[10].mean() / seen.mean():.0%} of it, and {by_count[10].mean() / by_count[60].mean():.0%} of what "
        f"60 do. The first {args.trained} of the new users, row trained by AdamW on 60 pairs without a prior: "
        f"{by_descent.mean():.3f}; adapted from 10: {same:.3f} ({same / by_descent.mean():.0%}).",
    ]
    alone = world.pairs(10, users=1)
    start = time.perf_counter()
    adapt_users(model, alone)
    with_prior = time.perf_counter() - start
    start = time.perf_counter()
    adapt_users(model, alone, prior=prior)
    lines.append(
        f"\nOne user, 10 pairs: {time.perf_counter() - start:.2f} s ({with_prior:.2f} s with the prior fitted anew)."
    )
    crowd = Simulation(model, args.crowd).pairs(10)
    start = time.perf_counter()
    adapt_users(model, crowd, prior=prior)
    seconds = time.perf_counter() - start
    lines.append(
        f"{args.crowd} users, 10 pairs each, all different: {seconds:.1f} s, {args.crowd / seconds:.1f} users a second."
    )
    tell(f"{about()}; {args.users} new users.\n\n" + "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
