"""The user rows of a checkpoint: in the tables of the model and in the optimizer state.

Works on a checkpoint's content without the model: the checkpoint names the tables and stores a new user's row.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.users import look_alikes
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.training.checkpoint_entry import entry_of, users_of


def move_toward(new: Tensor, table: Tensor, factor: float) -> None:
    """Move all users' rows of a table toward a new user's row, in place.

    Args:
        new: `[...]` the row of a new user.
        table: `[1 + number of users, ...]`; row 0 stays.
        factor: The part of the distance that is left, in [0, 1]; exact at 0 and 1.
    """
    table[1:] = torch.lerp(new.expand_as(table[1:]), table[1:], factor)


def user_rows(content: dict[str, Any], path: Path) -> UserRows:
    """Return the user rows of a checkpoint that has been read, or raise an error.

    Args:
        content: Result of `read_checkpoint`.
        path: Its path.
    """
    if not content:
        raise ConfigurationError(f"model: {path} is a sharded checkpoint; users can be read only from a file.")
    try:
        return UserRows(content)
    except PRLHFError as error:
        raise ConfigurationError(f"model: {path}: {error}") from error


class UserRows:
    """Reads and changes the users of a checkpoint.

    Args:
        checkpoint: Content of the file; `keep` and `add` change it.
    """

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._entry = entry_of(checkpoint)
        if "new_rows" not in self._entry:
            raise ConfigurationError(
                "This checkpoint does not say which of its weights are users' rows, as those of later versions do. Go "
                "on with its run (`fit --ckpt_path`), and use the checkpoint that is then written."
            )
        self.vocabulary = users_of(checkpoint)
        for name, table in self.tables.items():
            if len(table) != len(self.vocabulary):
                raise ConfigurationError(
                    f"This checkpoint has {len(self.vocabulary) - 1} users, and {name} rows of {len(table) - 1}."
                )
        # With the running statistics of users' rewards, if online RL trained the model.
        self._states = [*self._optimizer_states(), self._entry.get("advantages", {})]

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tables `[1 + number of users, ...]` by their names in the state dict; row 0 is the generic user's."""
        weights = self._checkpoint["state_dict"]
        return {name: weights[name] for name in self._entry["new_rows"]}

    @property
    def shares(self) -> tuple[str, ...]:
        """Names of the tables whose rows are weights before a softmax."""
        return tuple(self._entry.get("shares", ()))

    def row(self, user_id: str) -> int:
        """Return the row of a user; an unknown one is an error."""
        check_known_users([user_id], self.vocabulary)
        return int(self.vocabulary.rows([user_id])[0])

    def vectors(self) -> Tensor:
        """Return each user's rows with all tables concatenated, `[1 + number of users, width]` float32."""
        parts = [table.flatten(1).float() for table in self.tables.values()]
        return torch.cat(parts, dim=1) if parts else torch.zeros(len(self.vocabulary), 0)

    def steps(self) -> Tensor | None:
        """Return the number of steps of each row, `[1 + number of users]`, or None if the optimizer has no counts."""
        counts = [state["row_steps"] for state in self._states if "row_steps" in state]
        return torch.stack(counts).amax(0).long() if counts else None

    def remembered(self) -> list[Tensor]:
        """Return all stored tensors of users: the tables, and the optimizer's averages of their gradients."""
        of_states = [value for state in self._states for value in self._by_row(state).values() if value.dim() > 1]
        return [*self.tables.values(), *of_states]

    def new_rows(self) -> list[Tensor]:
        """Return the row of a new user in each table."""
        return [self._entry["new_rows"][name].to(table.dtype) for name, table in self.tables.items()]

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all users except `rows`; row 0 stays.

        The tensors are copies: a slice would save the whole old table.
        """
        index = torch.tensor([0, *rows])
        self._replace(lambda table, _: table[index], lambda value: value[index])
        self._rename([self.vocabulary.ids[row - 1] for row in rows])

    def add(self, user_ids: Sequence[str]) -> None:
        """Add rows for new users, initialized as the generic user."""
        known = [user_id for user_id in user_ids if user_id in self.vocabulary]
        if known:
            raise ConfigurationError(f"user: {known[0]!r} is in this checkpoint already; add only new users.")

        new_rows = dict(zip(self.tables, self.new_rows(), strict=True))

        def with_new(table: Tensor, name: str) -> Tensor:
            row = new_rows[name]
            return torch.cat([table, row.expand(len(user_ids), *row.shape)])

        self._replace(with_new, lambda value: torch.cat([value, value.new_zeros(len(user_ids), *value.shape[1:])]))
        self._rename([*self.vocabulary.ids, *user_ids])

    def set_last(self, vectors: Tensor) -> None:
        """Overwrite the rows of the last users.

        Args:
            vectors: `[n, width]` their rows with all tables concatenated, as in `vectors`.
        """
        parts = torch.split(vectors, [table[0].numel() for table in self.tables.values()], dim=1)
        for table, part in zip(self.tables.values(), parts, strict=True):
            table[len(table) - len(part) :] = part.reshape(-1, *table.shape[1:]).to(table)

    def shrink(self, factor: float, names: Collection[str]) -> None:
        """Move every user's rows toward those of a new user, to `factor` times the distance.

        Args:
            factor: In [0, 1].
            names: Names of the tables.
        """
        new = dict(zip(self.tables, self.new_rows(), strict=True))
        for name in names:
            move_toward(new[name], self.tables[name], factor)

    def require_trained(self, path: Path) -> None:
        """Refuse a checkpoint without trained user rows: its user model has none, or they were not trained."""
        if not self.tables:
            raise ConfigurationError(
                f"model: {path} holds no trained user rows, so there is no prior for new users and nothing "
                "to shrink. Train a user model with rows, such as IndividualUserModel."
            )

    def _replace(self, of_table: Callable[[Tensor, str], Tensor], of_state: Callable[[Tensor], Tensor]) -> None:
        for name, table in self.tables.items():
            self._checkpoint["state_dict"][name] = of_table(table, name)
        for state in self._states:
            state.update({key: of_state(value) for key, value in self._by_row(state).items()})

    def _rename(self, user_ids: Sequence[str]) -> None:
        self._entry["users"] = list(user_ids)
        self.vocabulary = UserVocabulary(user_ids)

    def _by_row(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return the parts of a table's optimizer state with one row per user."""
        return {
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.vocabulary)
        }

    def _optimizer_states(self) -> Iterator[dict[str, Any]]:
        """Yield the optimizer state of each table: tables are the parameters of one group, in order."""
        optimizers = self._checkpoint.get("optimizer_states") or []
        groups = [(group, o["state"]) for o in optimizers for group in o["param_groups"]]
        found = [(group["params"], state) for group, state in groups if group.get("name") == "user_tables"]
        if optimizers and self.tables and [len(params) for params, _ in found] != [len(self.tables)]:
            raise ConfigurationError(
                "The optimiser's state in this checkpoint has no group `user_tables` with one entry a table, as "
                "`PersonalizedLM.configure_optimizers` makes it, so that it is not known which rows are whose."
            )
        for params, state in found:
            yield from (state[param] for param in params if param in state)


_NEAREST = 3
_PSEUDONYM = re.compile("[0-9a-f]{32}")  # see `Pseudonyms`


def check_known_users(
    user_ids: Iterable[str], vocabulary: UserVocabulary, option: str = "user", more: str = ""
) -> None:
    """Refuse unknown ids, and suggest similar known ones.

    Args:
        user_ids: The given ids.
        vocabulary: The users of the model.
        option: Name of the option, for messages.
        more: Further advice at the end of the message.

    Raises:
        ConfigurationError: An id is unknown.
    """
    missing = [user_id for user_id in user_ids if user_id not in vocabulary]
    if not missing:
        return
    others = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
    near = closest_ids(missing[0], vocabulary.ids)
    meant = f"did you mean {' or '.join(near)}?" if near else "`users list` shows who is."
    if vocabulary.ids and not near and all(map(_PSEUDONYM.fullmatch, vocabulary.ids)):
        meant = (
            "its users seem to be pseudonyms (data.hash_user_ids_with), so give the user's, which this prints: python "
            "-c 'import sys; from prlhf_lightning.data import Pseudonyms; print(Pseudonyms.load(sys.argv[1])"
            "(sys.argv[2]))' SALT ID"
        )
    raise ConfigurationError(f"{option}: {missing[0]!r} is not in this model{others}; {meant}{more}")


def closest_ids(user_id: str, known: Sequence[str]) -> list[str]:
    """Return the most similar known ids, formatted for display."""
    alike = next((group for group in look_alikes([user_id, *known]) if group[0] == user_id), [user_id])[1:]
    found = alike[:_NEAREST] or difflib.get_close_matches(user_id, known, n=_NEAREST, cutoff=0.75)
    return [ascii(one) if _same_glyphs(one, user_id) else repr(one) for one in found]


def _same_glyphs(one: str, other: str) -> bool:
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
