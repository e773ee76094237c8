r"""Is personalization worth it on your pairs? Your configuration beside baselines, on the same validation pairs.

    python benchmarks/baselines.py --config configs/from_scratch.yaml \
        --train train.jsonl --validation validation.jsonl --seeds 3 --out runs/baselines

Writes `table.txt`, `table.md` and `table.json` into the folder. Every finished cell (a method with a seed) is kept
there: the same command goes on where it was stopped. Words that are not options of this script go to `fit`, such as
`--trainer.max_epochs 2`. The models of ids need no configuration: `--only one_score id_low_rank`.
See docs/benchmarks/baselines.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from baselines_fits import Fit, margins_of, opened, rows_in, shrunk_margins
from baselines_ids import id_low_rank, new_people, one_score, read_votes
from baselines_rows import id_prefaces, pair_prefaces, read_records, write_rows
from baselines_table import Outcomes, summary
from reporting import about
from rich.console import Console
from rich.table import Table

from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.utils.io import atomic_write_bytes, check_output_folder

IDS = {"one_score": "one score a text, no user", "id_low_rank": "low-rank of ids, no text"}
FITS = {
    "vanilla": "vanilla, no user",
    "ids_as_text": "ids as text in the prompt",
    "pairs_in_prompt": "the user's pairs in the prompt",
    "personalized": "personalized",
    "shrunk": "personalized, shrunk",
}
METHODS = IDS | FITS
COLUMNS = {
    "pooled": "over pairs",
    "by_person": "mean over people",
    "worst_tenth": "worst tenth of people",
    "gain": "gain over {reference}, points a person",
    "gain_over_generic": "gain over own generic user, points a person",
}


@dataclass(frozen=True)
class Study:
    """What is measured, on which files.

    Attributes:
        config: Configuration of `fit`; None if no method needs it.
        words: Further words for `fit`.
        shown: Most pairs in a prompt.
        characters: Most characters of a text among them.
        out: The folder.
    """

    config: Path | None
    words: Sequence[str]
    shown: int
    characters: int
    out: Path

    def rows(self, kind: str) -> Path:
        """Return the folder of the rows that a method is trained on."""
        return self.out / "rows" / (kind if kind in ("ids_as_text", "pairs_in_prompt") else "plain")

    def cell(self, method: str, seed: int) -> Path:
        """Return the file of a cell."""
        return self.out / "cells" / f"{method}-{seed}.json"

    def fit(self, method: str, seed: int, longer: int) -> Fit:
        """Return the run of a method."""
        method = "personalized" if method == "shrunk" else method
        if self.config is None:
            raise ConfigurationError(f"config: {METHODS[method]} is trained by `fit`; give its configuration.")
        users = method == "personalized"
        return Fit(self.config, self.words, self.rows(method), users, longer, self.out / "fits" / f"{method}-{seed}")

    def prepare(self, train: Path, validation: Path) -> dict[str, int]:
        """Write the rows of all methods; return by how many tokens at most each makes prompts longer.

        Raises:
            ConfigurationError: The folder holds cells of other data or settings.
        """
        records, held_out = read_records(train), read_records(validation)
        if not records or not held_out:
            raise ConfigurationError("train, validation: one of them holds no pair but for ties; give other files.")
        prefaces = {
            "plain": [[""] * len(part) for part in (records, held_out)],
            "ids_as_text": [id_prefaces(part) for part in (records, held_out)],
            "pairs_in_prompt": [
                pair_prefaces(part, records, self.shown, self.characters, seed=0) for part in (records, held_out)
            ],
        }
        for kind, (front, held_out_front) in prefaces.items():
            write_rows(self.rows(kind) / "train.jsonl", records, front)
            write_rows(self.rows(kind) / "validation.jsonl", held_out, held_out_front)
        self._check_same()
        # A token is a byte or more.
        return {kind: max(len(one.encode()) for part in both for one in part) for kind, both in prefaces.items()}

    def _check_same(self) -> None:
        digest = sha256(self.config.read_bytes() if self.config else b"")
        digest.update(json.dumps([list(self.words), self.shown, self.characters]).encode())
        for path in sorted(self.out.glob("rows/*/*.jsonl")):
            digest.update(path.read_bytes())
        kept = self.out / "cells" / "of.json"
        now = {"rows": _digest(self.rows("plain")), "all": digest.hexdigest()}
        before = json.loads(kept.read_text()) if kept.exists() else now
        has_fits = any(any(self.out.glob(f"cells/{method}-*.json")) for method in FITS)
        if before["rows"] != now["rows"] or (has_fits and before["all"] != now["all"]):
            raise ConfigurationError(
                f"out: {self.out} holds results of other rows, of another configuration or of other words for fit. "
                "Choose another folder, or remove this one."
            )
        if before["all"] != now["all"]:
            shutil.rmtree(self.out / "fits", ignore_errors=True)  # of other settings, and unfinished
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(kept, json.dumps(now).encode())


def _digest(folder: Path) -> str:
    return sha256(b"".join((folder / f"{split}.jsonl").read_bytes() for split in ("train", "validation"))).hexdigest()


def measure(study: Study, method: str, seed: int, longer: int) -> dict[str, Any]:
    """Return a cell: margins of the validation pairs, and of the method's own generic user if it has users."""
    plain, start, note = study.rows("plain"), time.perf_counter(), ""
    generic = None
    if method in IDS:
        votes = read_votes(plain / "train.jsonl", plain / "validation.jsonl")
        if method == "one_score":
            own = one_score(*votes, seed)
        else:
            own, generic, note = id_low_rank(*votes, seed)
    else:
        fit = study.fit(method, seed, longer)
        checkpoint, pairs = fit.run(seed), rows_in(fit.rows / "validation.jsonl")
        if method == "shrunk":
            own, note = shrunk_margins(checkpoint, pairs, seed)
            note = f"factors {note}"
        else:
            own = margins_of(opened(checkpoint), pairs)
        if fit.users:
            generic = margins_of(opened(checkpoint), pairs, generic=True)
    seconds = time.perf_counter() - start
    margins = {"own": own.tolist(), "generic": None if generic is None else generic.tolist()}
    return {**margins, "seconds": seconds, "note": note}


def run_cells(
    study: Study, methods: Sequence[str], seeds: int, longer: dict[str, int], trials: bool, console: Console
) -> None:
    """Run the cells that are not in the folder yet, and say how far they are."""
    cells = [(method, seed) for method in methods for seed in range(seeds)]
    missing = [cell for cell in cells if not study.cell(*cell).exists()]
    if len(missing) < len(cells):
        console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are in {study.out} already.")
    guesses = estimates(study, [method for method, _ in missing], longer, console) if trials else {}
    for number, (method, seed) in enumerate(missing):
        left = sum(guesses.get(name, 0.0) for name, _ in missing[number:])
        time_left = f"; about {_span(left)} left" if left else ""
        console.print(f"[{number + 1}/{len(missing)}] {METHODS[method]}, seed {seed}{time_left}")
        found = measure(study, method, seed, longer.get(method, 0))
        atomic_write_bytes(study.cell(method, seed), json.dumps(found).encode())
        console.print(f"    {_span(found['seconds'])}{', ' + found['note'] if found['note'] else ''}")
        guesses[method] = found["seconds"]


def estimates(study: Study, methods: Sequence[str], longer: dict[str, int], console: Console) -> dict[str, float]:
    """Return about how many seconds a cell of each method takes, by trials of `fit` of a few steps."""
    trained = [method for method in FITS if method in methods and method != "shrunk"]
    if not trained:
        return {}
    console.print("Estimating the time by a few steps of each kind of run.")
    sizes = [sum(1 for _ in (study.rows("plain") / f"{split}.jsonl").open()) for split in ("train", "validation")]
    found = {}
    for method in trained:
        found[method] = study.fit(method, 0, longer.get(method, 0)).seconds(*sizes)
        console.print(f"    {METHODS[method]}: about {_span(found[method])} a seed")
    return found


def tables(study: Study, methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Return the content of the tables, from the cells in the folder."""
    plain = study.rows("plain")
    votes = read_votes(plain / "train.jsonl", plain / "validation.jsonl")[1]
    users = np.unique(votes.users, return_inverse=True)[1]
    cells = votes.users * votes.num_items + np.stack([votes.winners, votes.losers])
    outcomes, rows = {}, {}
    for method in methods:
        kept = [json.loads(study.cell(method, seed).read_text()) for seed in range(seeds)]
        generic = None if kept[0]["generic"] is None else [np.array(one["generic"]) for one in kept]
        outcomes[method] = Outcomes.of([np.array(one["own"]) for one in kept], generic)
        rows[method] = {
            "label": METHODS[method],
            "seconds": float(np.mean([one["seconds"] for one in kept])),
            "notes": [one["note"] for one in kept if one["note"]],
        }
    reference = next(name for name in ("vanilla", "one_score", *methods) if name in outcomes)
    for method, values in summary(outcomes, users, cells, reference).items():
        rows[method] |= values
    sizes = {"pairs": len(users), "people": int(users.max()) + 1, "seeds": seeds}
    return {"command": about(), "reference": reference, "validation": sizes, "methods": rows}


def lines_of(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the cells of the table."""
    reference = METHODS[content["reference"]].split(",")[0]
    head = ["", *(title.format(reference=reference) for title in COLUMNS.values()), "time a seed"]
    lines = []
    for row in content["methods"].values():
        cells = [_cell(row[key], key.startswith("gain")) for key in COLUMNS]
        lines.append([row["label"], *cells, _span(row["seconds"])])
    return head, lines


def caption(content: dict[str, Any]) -> str:
    """Return what the table shows, in words."""
    sizes, reference = content["validation"], METHODS[content["reference"]].split(",")[0]
    return (
        f"Validation pair accuracy; {sizes['pairs']:,} pairs of {sizes['people']:,} people, mean of {sizes['seeds']} "
        "seeds; in brackets 95% intervals, by a bootstrap over people and seeds. A tie counts as half. The worst tenth "
        f"are the people whom {reference} ranks worst on the pairs of one half of their responses, measured on the "
        "pairs of the other half: otherwise the lowest values would be those of chance."
    )


def verdict(content: dict[str, Any]) -> list[str]:
    """Return sentences that say what is gained by knowing the user."""
    sentences = []
    for name in ("id_low_rank", "personalized", "shrunk"):
        row = content["methods"].get(name)
        gain = row and row["gain"]
        if not gain:
            continue
        what = "more than" if gain[1] > 0 else "less than" if gain[2] < 0 else "not clearly other than"
        better = METHODS[content["reference"]].split(",")[0]
        sentences.append(f"{row['label'].capitalize()}: {what} {better} ({_cell(gain, True)} points a person).")
    return sentences


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def new_people_text(points: Sequence[dict[str, Any]]) -> str:
    """Return the gains of new people as a Markdown table."""
    lines = [[str(one["pairs"]), f"{one['pooled']:.3f}", _cell(one["gain"], True)] for one in points]
    head = ["pairs", "over pairs", "gain over the generic user, points a person"]
    return (
        f"{points[0]['people']:,} new people after their first pairs, by the low-rank model of ids, seed 0:\n\n"
        f"{markdown(head, lines)}"
    )


def write(study: Study, content: dict[str, Any]) -> str:
    """Write the tables in three forms; return the text."""
    head, lines = lines_of(content)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    notes = [f"{row['label']}: {'; '.join(row['notes'])}" for row in content["methods"].values() if row["notes"]]
    more = [new_people_text(content["new_people"])] if "new_people" in content else []
    told = [caption(content), *verdict(content), *notes, *more]
    text = console.export_text() + "\n" + "\n\n".join([*told, content["command"]]) + "\n"
    files = {
        "table.txt": text,
        "table.md": "\n\n".join([content["command"] + ".", markdown(head, lines), *told]) + "\n",
        "table.json": json.dumps(content, indent=2) + "\n",
    }
    for name, written in files.items():
        atomic_write_bytes(study.out / name, written.encode())
    return text


def _cell(value: Sequence[float] | None, is_gain: bool) -> str:
    if value is None:
        return ""
    mean, low, high = value
    if is_gain:
        return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="configuration of fit; its data source is replaced by the files")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--shown", type=int, default=3, help="the user's pairs in a prompt")
    parser.add_argument("--characters", type=int, default=100, help="of each text of these pairs")
    parser.add_argument("--no_estimate", action="store_true", help="no trial steps at the start to estimate the time")
    parser.add_argument("--new_people", type=Path, nargs=2, metavar="FILE", help="pairs to adapt from, and others")
    args, rest = parser.parse_known_args(words)
    methods = [name for name in METHODS if name in (args.only or (METHODS if args.config else IDS))]
    study = Study(args.config, rest, args.shown, args.characters, args.out)
    console = Console(highlight=False, markup=False)
    try:
        if args.seeds < 1:
            raise ConfigurationError(f"seeds is {args.seeds}; give 1 or more.")
        if args.config is not None and not args.config.is_file():
            raise ConfigurationError(f"config: there is no file {args.config}.")
        if rest and args.config is None:
            raise ConfigurationError(f"{rest[0]} is no option of this script, and without --config no fit reads it.")
        check_output_folder(args.out, "out")
        longer = study.prepare(args.train, args.validation)
        run_cells(study, methods, args.seeds, longer, not args.no_estimate, console)
        content = tables(study, methods, args.seeds)
        if args.new_people:
            content["new_people"] = new_people(args.train, *args.new_people, seed=0)
        print(write(study, content))
    except PRLHFError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
