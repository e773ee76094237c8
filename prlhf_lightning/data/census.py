"""How many rows each user has, counted in one pass that reads nothing else: all that a stream must know in advance.

Memory grows with the users only. The counts are kept in the cache folder, as a CSV file of the columns `user_id`,
`rows` and `texts` (how many of the rows have a text about the user), so the next start does not count again. Its
SHA-256 stands in a file beside it; a damaged file is counted again. The same file can be given, where the counts are
known already, as from a database.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prlhf_lightning.data.progress import counting
from prlhf_lightning.data.readers import read_rows
from prlhf_lightning.data.records import Columns, parse_user_id, spell_user_id
from prlhf_lightning.data.sources.base import DataSource, Split, read
from prlhf_lightning.errors import FeedbackFormatError
from prlhf_lightning.files import as_text, atomically

_FORMAT = 2  # raise it when the meaning of what is stored changes, so that older counts are not read
_SHOWN_EVERY = 10_000  # rows
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Census:
    """Who has how many rows.

    Attributes:
        rows: Number of rows of each user, in the order in which they first appear.
        texts: Number of rows with a text about the user.
    """

    rows: dict[str, int]
    texts: int


def census_of(source: DataSource, split: Split, folder: Path) -> Census:
    """Return the census of a split of a source, counted unless `folder` has it.

    Raises:
        FeedbackFormatError: A row has no valid user id, or there are no rows.
        ConfigurationError: The folder cannot be written.
    """
    parts = {
        "format": _FORMAT,
        "source": f"{type(source).__module__}.{type(source).__qualname__}",
        "fingerprint": source.fingerprint(split),
        "columns": dict(source.columns),
    }
    digest = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"users-{digest}.csv"
    if path.exists() and _sum_file(path).exists():
        if _sum_file(path).read_bytes() == _sum(path):
            return read_census(path)
        _log.warning("The count of users %s is damaged. They are counted again.", path)
    census = count(source, split)
    try:
        _write(census, path)
    except OSError as error:
        _log.warning(
            "data.cache_dir is %s, where the count of users cannot be written (%s). It is made again at the next "
            "start; free space there, or set data.cache_dir (or the variable PRLHF_CACHE) to a folder that can be "
            "written.",
            folder, error,
        )  # fmt: skip
    return census


def count(source: DataSource, split: Split) -> Census:
    """Count the rows of each user of a split, with a progress bar."""
    columns = Columns.from_mapping(source.columns)
    rows: dict[str, int] = {}
    texts = number = 0
    with counting(f"Counting the users of the {split} split") as progress:
        for number, (where, row) in enumerate(read(source, split), start=1):
            user_id = row.get(columns.user_id)
            if type(user_id) is str and user_id in rows:  # almost always; the rest is for the first row of a user
                rows[user_id] += 1
            else:
                rows[parse_user_id(row, where, columns)] = 1
            texts += row.get(columns.user_text) is not None
            if number % _SHOWN_EVERY == 0:
                progress.update(progress.task_ids[0], completed=number)
    if not number:
        raise FeedbackFormatError(f"The {split} split of {type(source).__name__} has no rows; give it at least one.")
    return Census(rows, texts)


def read_census(path: Path) -> Census:
    """Read a census from a file (CSV, JSON Lines or Parquet) of the columns `user_id`, `rows` and, optionally, `texts`.

    Raises:
        FeedbackFormatError: The file is not of this form; the message names the row.
    """
    rows: dict[str, int] = {}
    texts = 0
    for where, row in read_rows(path):
        user_id = parse_user_id(spell_user_id(row, "user_id"), where)
        if user_id in rows:
            raise FeedbackFormatError(f"{where}: this user stands in the file twice; give each user one row.")
        rows[user_id] = _number(row.get("rows"), where, "rows", least=1)
        # Where it is not said how many rows have a text, all may.
        texts += rows[user_id] if row.get("texts") is None else _number(row["texts"], where, "texts", least=0)
    return Census(rows, texts)


def _number(value: object, where: str, field: str, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if number < least:
        raise FeedbackFormatError(f"{where}: field {field!r} is {value!r}; write a whole number, at least {least}.")
    return number


def _write(census: Census, path: Path) -> None:
    with atomically(path, shared=True) as file, as_text(file) as text:  # processes that count at once write the same
        writer = csv.writer(text)
        writer.writerow(["user_id", "rows", "texts"])
        writer.writerows(_lines(census))
    with atomically(_sum_file(path), shared=True) as file:
        file.write(_sum(path))


def _sum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sum(path: Path) -> bytes:
    """Return the line that `sha256sum` prints."""
    return f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()


def _lines(census: Census) -> Iterable[tuple[str, int, int]]:
    left = census.texts  # only the total is ever used
    for user_id, rows in census.rows.items():
        texts = min(rows, left)
        left -= texts
        yield user_id, rows, texts
