"""The command `score`: rewards of the texts in files, for the user of each row."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from prlhf_lightning.cli.candidates import report_unknown
from prlhf_lightning.cli.models import pick_device
from prlhf_lightning.data import DataSource, FileSource
from prlhf_lightning.data.conversations import fail
from prlhf_lightning.data.privacy import hashed
from prlhf_lightning.data.readers import Unreadable
from prlhf_lightning.data.records import Columns, FeedbackRecord, parse_record
from prlhf_lightning.data.sources.files import Paths
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.training import load_scorer
from prlhf_lightning.training.checkpoint_files import checkpoint_of, origin
from prlhf_lightning.training.scorer import Scorer
from prlhf_lightning.utils.io import atomic_writer, check_output
from prlhf_lightning.utils.journal import Journal
from prlhf_lightning.utils.progress import counted, progress_bars
from prlhf_lightning.utils.terminal import printable

_BLOCK = 4096  # texts in memory, and between two entries of the journal
_LISTED = 5


def score(
    reward_model: Path,
    data: Paths,
    output: Path,
    columns: dict[str, str] | None = None,
    generic: bool = False,
    on_error: Literal["stop", "report"] = "stop",
    device: str = "auto",
    hash_user_ids_with: str | None = None,
    trust_classes: list[str] | None = None,
) -> None:
    """Write the rewards of texts for users, and rank candidates.

    Rows have `user_id`, `prompt` and one of `completion`, a list `completions`, or `chosen` and `rejected`. They are
    written with `reward`; with `rewards` and `ranking` (numbers of the completions from 0, best first); or with
    `chosen_reward`, `rejected_reward` and `probability` (that the user prefers `chosen`). See docs/reward_models.md. A
    stopped command continues where it was if it is repeated.

    Args:
        reward_model: A checkpoint of a reward model, or of a policy (whose implicit reward is used), or the folder of
            its run.
        data: File or files of rows: JSON Lines, JSON, CSV (each also gzipped) or Parquet.
        output: The JSONL file to write. It is written atomically at the end; until then, `OUTPUT.progress` keeps what
            is done.
        columns: Mapping of fields to column names, such as `{user_id: worker, completions: answers}`.
        generic: Score for the generic user; rows need no `user_id`.
        on_error: Whether the first malformed row stops the command before anything is scored, or such rows are written
            without a reward, with the reason as `problem`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training; what is written are the pseudonyms.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    if output.suffix != ".jsonl":
        raise ConfigurationError(f"output: {output} does not end in .jsonl; rows are written as JSON Lines.")
    unfinished = output.with_name(f"{output.name}.progress")
    for path in (output, unfinished):
        check_output(path, "output")
    rows = _Rows.of(data, columns, generic, hash_user_ids_with, on_error == "report")
    path = checkpoint_of(reward_model, "reward_model")
    scorer = load_scorer(path, pick_device(device), trust_classes, "reward_model")
    total = 0
    users: dict[str, None] = {}
    for item in counted(rows, "Checking rows"):
        total += len(item.records)
        users.update(dict.fromkeys(record.user_id for record in item.records))
    if not generic:
        report_unknown(scorer.vocabulary, users, str(path))
    settings = {"model": origin(path), "data": rows.source.fingerprint("train"), "columns": columns, "generic": generic}
    journal = Journal(unfinished, settings)
    if journal.replaced:
        sys.stderr.write(f"{unfinished} is of other data or settings: starting over.\n")
    report = _Report()
    with atomic_writer(output) as file, progress_bars() as progress:
        task = progress.add_task("Scoring texts", total=total)
        for number, block in enumerate(_blocks(rows)):
            key = str(number)
            texts = sum(len(item.records) for item in block)
            if key not in journal.results:
                journal.add(key, _results(scorer, block))
            results = journal.results.pop(key)  # memory stays bounded
            _write(file, scorer, block, results, report)
            progress.advance(task, texts)
    journal.remove()
    report.tell(scorer)
    for said in rows.unread:
        sys.stderr.write(f"NOT READ TO ITS END: {printable(said)}\n")
    print(f"{report.rows:,} rows with {total:,} texts are in {output}")
    sys.exit(1 if rows.unread else 0)


@dataclass(frozen=True)
class _Item:
    """A row and its texts.

    Attributes:
        where: The file and the line.
        row: The row as it was read.
        records: A record for each text, as a thumbs-up; none for a malformed row.
        kind: The field or fields that hold the texts.
        problem: What is wrong with a malformed row.
    """

    where: str
    row: Mapping[str, Any]
    records: Sequence[FeedbackRecord]
    kind: Literal["completion", "completions", "pair"] = "completion"
    problem: str = ""


@dataclass
class _Rows:
    """The rows of files, read anew at each iteration.

    Attributes:
        source: The files.
        columns: Names of the columns.
        completions: Name of the column of lists.
        generic: Whether all rows are scored for the generic user.
        reports: Whether a malformed row is an item with a problem, and not an error.
        unread: Places at which reading stopped, in the last iteration.
    """

    source: DataSource
    columns: Columns
    completions: str
    generic: bool
    reports: bool
    unread: list[str]

    @classmethod
    def of(
        cls, data: Paths, columns: Mapping[str, str] | None, generic: bool, hash_with: str | None, reports: bool
    ) -> _Rows:
        named = dict(columns or {})
        completions = named.pop("completions", "completions")
        source = hashed(FileSource(data, columns=named), hash_with)
        return cls(source, Columns.from_mapping(named), completions, generic, reports, [])

    def __iter__(self) -> Iterator[_Item]:
        self.unread = []
        for where, row in self.source.scan("train"):
            try:
                if isinstance(row, Unreadable):
                    raise row.error
                yield self._item(where, row)
            except FeedbackFormatError as error:
                if not self.reports:
                    raise
                if isinstance(row, Unreadable):
                    if row.rest:
                        self.unread.append(str(error))
                    row = {}
                problem = f"field {error.field!r} {error.problem}" if error.field else error.problem
                yield _Item(where, row, (), problem=problem)

    def _item(self, where: str, row: Mapping[str, Any]) -> _Item:
        columns = self.columns
        base = {**row, columns.label: True}
        if self.generic:
            base[columns.user_id] = "generic"
        if row.get(self.completions) is not None:
            texts = _listed(row[self.completions], where)
            del base[self.completions]
            records = [self._parsed({**base, columns.completion: text}, where, n) for n, text in enumerate(texts)]
            return _Item(where, row, records, "completions")
        if row.get(columns.chosen) is not None and row.get(columns.rejected) is not None:
            names = (columns.chosen, columns.rejected)
            others = {name: value for name, value in base.items() if name not in names}
            return _Item(
                where, row, [self._parsed({**others, columns.completion: row[name]}, where) for name in names], "pair"
            )
        return _Item(where, row, [self._parsed(base, where)])

    def _parsed(self, row: Mapping[str, Any], where: str, number: int | None = None) -> FeedbackRecord:
        try:
            record = parse_record(row, where, self.columns, "thumbs")
        except FeedbackFormatError as error:
            if number is None or error.field != "completion":
                raise
            raise FeedbackFormatError(
                error.problem, error.fix, field=f"completions[{number}]", where=where, kind=error.kind
            ) from error
        return replace(record, user_id="") if self.generic else record


def _listed(value: Any, where: str) -> list[Any]:
    """Return a list of completions, which CSV files hold as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    if not isinstance(value, list) or not value:
        fail(where, "completions", "is not a list of completions", "write a list of strings, in CSV files as JSON")
    return value


def _blocks(rows: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Yield rows in blocks of a bounded number of texts."""
    block: list[_Item] = []
    size = 0
    for item in rows:
        block.append(item)
        size += max(1, len(item.records))
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _results(scorer: Scorer, block: Sequence[_Item]) -> dict[str, Any]:
    """Return the rewards of a block's texts, and why some have none, as JSON values."""
    records = [record for item in block for record in item.records]
    scored = scorer.scored_records(records, [item.where for item in block for _ in item.records])
    rewards = [reward if math.isfinite(reward) else None for reward in scored.rewards.tolist()]
    return {"rewards": rewards, "problems": {str(number): said for number, said in scored.problems.items()}}


def _write(file: BinaryIO, scorer: Scorer, block: Sequence[_Item], results: Mapping[str, Any], report: _Report) -> None:
    start = 0
    for item in block:
        end = start + len(item.records)
        named = [item.problem] * bool(item.problem)
        for number in range(start, end):
            if said := results["problems"].get(str(number)):
                named.append(f"completions[{number - start}]: {said}" if item.kind == "completions" else said)
        found = _found(item, results["rewards"][start:end])
        start = end
        if item.records and item.records[0].user_id:
            found["known_user"] = scorer.knows(item.records[0].user_id)
        if named:
            found["problem"] = "; ".join(named)
            report.add(item.where, found["problem"])
        row = {**item.row, **found}
        file.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        report.rows += 1


def _found(item: _Item, rewards: Sequence[float | None]) -> dict[str, Any]:
    """Return the columns that are added to a row."""
    if not item.records:
        return {"reward": None}
    if item.kind == "completions":
        ranked = [n for n, reward in enumerate(rewards) if reward is not None]
        return {"rewards": list(rewards), "ranking": sorted(ranked, key=lambda n: -(rewards[n] or 0.0))}
    if item.kind == "completion":
        return {"reward": rewards[0]}
    chosen, rejected = rewards
    known = chosen is not None and rejected is not None
    probability = _sigmoid(chosen - rejected) if known else None  # type: ignore[operator]
    return {"chosen_reward": chosen, "rejected_reward": rejected, "probability": probability}


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0


class _Report:
    """Counts what is to be told at the end."""

    def __init__(self) -> None:
        self.rows, self._problems = 0, 0
        self._first: list[str] = []

    def add(self, where: str, problem: str) -> None:
        self._problems += 1
        if len(self._first) < _LISTED:
            self._first.append(f"{where}: {problem}")

    def tell(self, scorer: Scorer) -> None:
        """Print the problems, and the number of texts that were cut."""
        lines = [f"{self._problems:,} rows have texts without a reward:"] if self._problems else []
        lines += [f"  {line}" for line in self._first]
        if self._problems > len(self._first):
            lines.append(f"  and {self._problems - len(self._first):,} more (see `problem` in the output)")
        lines += [
            f"{excess.count:,} texts had their {name} cut as in training; the first is {excess.first}"
            for name, excess in scorer.cut.items()
        ]
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))
