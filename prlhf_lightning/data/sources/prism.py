"""Data source of PRISM: dialogues of 1,396 people with several models at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from prlhf_lightning.data.columns import Schema
from prlhf_lightning.data.records import Message
from prlhf_lightning.data.sources.base import Split
from prlhf_lightning.data.sources.derived import DerivedSource, check_template, filled, left_out, original, unusable
from prlhf_lightning.errors import ConfigurationError

Preferences: TypeAlias = Literal["rated", "displayed"]

_SURVEY = Schema("a row of PRISM's survey")
_DIALOGUE = Schema("a row of PRISM's conversations")
_FACTS = ("age", "gender", "education", "employment_status", "marital_status", "english_proficiency")
_TEXTS = ("self_description", "system_string", *_FACTS)

USER_TEXT = (
    "preference: {preferences}; self_description: {self_description}; age: {age}; gender: {gender}; "
    "education: {education}; employment: {employment_status}; marital: {marital_status}; "
    "english_proficiency: {english_proficiency}; "
)


@dataclass
class _Turn:
    asked: str | None = None
    chosen: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Dialogue:
    where: str
    dialogue_id: str
    user_id: str
    turns: list[_Turn]


class PRISMSource(DerivedSource):
    """Pairs of the reply that a person chose and each other reply, with the dialogue so far as the prompt.

    Reads `survey.jsonl` and `conversations.jsonl` (`prism_codebook.pdf` in github.com/HannahKirk/prism-alignment) or
    `HannahRoseKirk/prism-alignment` on the hub. The prompt is a conversation of the person's messages and the chosen
    replies. Follows the protocol of arXiv:2402.05133 (`data/prism_dataset.ipynb` in
    github.com/HumainLab/Personalized_RLHF). It drops dialogues without a usable turn, shuffles the users and holds out
    10% of them, then 10% of the others' dialogues; a user with one dialogue counts as unseen. `seed: 123` gives the
    authors' split: they print 1,234 seen and 162 unseen users of 1,396, and drop dialogues c2536 and c4146. The data
    set's card counts 8,011 dialogues and 68,371 rated replies.

    The text about a user also follows the authors, with one exception. They read a person's three top preferences from
    the order in which the survey displayed the options (`order_stated_prefs`; see "Display Order" in the survey's
    question mapping). The default here is the three options that the person rated highest (`stated_prefs`).

    Args:
        folder: Folder with the two files; without it the data set is loaded from the hub.
        hub: Name on the hub, or a local copy that `datasets` loads.
        revision: Branch, tag or commit on the hub.
        user_text_template: Text about the user, with any of `{preferences}`, `{self_description}`, `{system_string}`,
            `{age}`, `{gender}`, `{education}`, `{employment_status}`, `{marital_status}` and `{english_proficiency}`;
            null for none. These are personal data: see `docs/data_sources.md`.
        preferences: Which three preferences the text lists: the highest `rated` ones (ties in the survey's order of
            names), or the first three `displayed`, as in the authors' code.
        max_characters: Most characters of the person's message and a reply together, as in the protocol; longer pairs
            are left out. Null for no limit.
        unseen_user_fraction: Share of users with all their dialogues in the validation split.
        held_out_fraction: Share of each other user's dialogues in the validation split.
        seed: Seed of the split.

    Raises:
        FeedbackFormatError: A row is not in the original schema, or a dialogue's user is not in the survey.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        hub: str = "HannahRoseKirk/prism-alignment",
        revision: str | None = None,
        user_text_template: str | None = USER_TEXT,
        preferences: Preferences = "rated",
        max_characters: int | None = 2300,
        unseen_user_fraction: float = 0.1,
        held_out_fraction: float = 0.1,
        seed: int = 123,
    ) -> None:
        if user_text_template is not None:
            check_template("user_text_template", user_text_template, ("preferences", *_TEXTS))
        if preferences not in get_args(Preferences):
            raise ConfigurationError(
                f"PRISMSource: preferences is {preferences!r}; it must be one of {get_args(Preferences)}."
            )
        for name, value in (("unseen_user", unseen_user_fraction), ("held_out", held_out_fraction)):
            if not 0 <= value < 1:
                raise ConfigurationError(f"PRISMSource: {name}_fraction is {value}; it is at least 0 and below 1.")
        self._survey, self._conversations = (
            original(Path(folder) / f"{name}.jsonl" if folder else None, hub, name=name, revision=revision)
            for name in ("survey", "conversations")
        )
        both = [self._survey, self._conversations]
        super().__init__(
            {"train": both, "validation": both},
            user_text=(user_text_template, preferences),
            max_characters=max_characters,
            division=(unseen_user_fraction, held_out_fraction, seed),
        )
        self.user_text_template, self.preferences, self.max_characters = user_text_template, preferences, max_characters
        self.unseen_user_fraction, self.held_out_fraction, self.seed = unseen_user_fraction, held_out_fraction, seed

    def pairs(self, split: Split, counts: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of a split's dialogues, in the order of the file."""
        texts, (train, dropped) = self._user_texts, self._division
        row: dict[str, Any]
        if split == "train" and dropped:
            counts["dialogues left out (no usable turn)"] += len(dropped)
        for dialogue in self._dialogues():
            if dialogue.dialogue_id not in dropped and (dialogue.dialogue_id in train) == (split == "train"):
                for prompt, chosen, rejected in self._judgements(dialogue, counts):
                    row = {"user_id": dialogue.user_id, "user_text": texts[dialogue.user_id], "prompt": prompt}
                    for name, reply in (("chosen", chosen), ("rejected", rejected)):
                        row[name] = [{"role": "assistant", "content": reply}]
                    yield dialogue.where, row

    def _judgements(self, dialogue: _Dialogue, counts: Counter[str]) -> Iterator[tuple[list[Message], str, str]]:
        history: list[Message] = []
        for turn in dialogue.turns:
            if turn.asked is None or not turn.chosen:
                counts["dialogues cut short (a turn without a message or a chosen reply)"] += 1
                return
            chosen = turn.chosen[0]
            history = [*history, {"role": "user", "content": turn.asked}]
            if not turn.others:
                counts["turns left out (no other reply)"] += 1
            for other in turn.others:
                if reason := unusable(chosen, other, "replies"):
                    counts[left_out(reason)] += 1
                elif self._is_long(turn.asked, chosen, least=True) or self._is_long(turn.asked, other):
                    counts[left_out(f"over max_characters={self.max_characters}")] += 1
                else:
                    yield history, chosen, other
            history = [*history, {"role": "assistant", "content": chosen}]

    def _is_long(self, asked: str, reply: str, least: bool = False) -> bool:
        """Return whether a pair exceeds the limit; the chosen reply must be below it, as in the protocol."""
        return self.max_characters is not None and len(asked) + len(reply) > self.max_characters - least

    def _is_usable(self, turn: _Turn) -> bool:
        if turn.asked is None or not turn.chosen or not turn.others:
            return False
        return not any(self._is_long(turn.asked, reply) for reply in (turn.chosen[0], *turn.others))

    @cached_property
    def _division(self) -> tuple[set[str], set[str]]:
        """Ids of the training dialogues, and of the dialogues without a usable turn."""
        of_user: dict[str, list[str]] = {user_id: [] for user_id in self._user_texts}
        dropped: set[str] = set()
        for dialogue in self._dialogues():
            of_user[dialogue.user_id].append(dialogue.dialogue_id)
            if not any(self._is_usable(turn) for turn in dialogue.turns):
                dropped.add(dialogue.dialogue_id)
        kept = {user: [d for d in ids if d not in dropped] for user, ids in of_user.items()}
        # As in the protocol, users without kept dialogues are shuffled with the others only if they never had a
        # dialogue; the shuffle depends on the number of users.
        users = np.array([user for user, ids in kept.items() if ids or not of_user[user]])
        draw = np.random.RandomState(self.seed)  # the generator behind np.random.seed, as in the protocol
        draw.shuffle(users)
        train: set[str] = set()
        for user in users[: _share(len(users), self.unseen_user_fraction)].tolist():
            ids = np.array(kept[user])
            draw.shuffle(ids)
            train |= set(ids[: _share(len(ids), self.held_out_fraction)].tolist())
        return train, dropped

    @cached_property
    def _user_texts(self) -> dict[str, str | None]:
        """The text about each user who completed a dialogue, in the order of the survey."""
        texts: dict[str, str | None] = {}
        for where, row in self._survey.rows():
            user_id = _SURVEY.get(row, where, "user_id", kind=str)
            if user_id in texts:
                _SURVEY.fail(where, ("user_id",), "stands in an earlier row too")
            if _SURVEY.get(row, where, "num_completed_conversations", kind=int) != 0:
                texts[user_id] = self._user_text(row, where)
        return texts

    def _user_text(self, row: Mapping[str, Any], where: str) -> str | None:
        if self.user_text_template is None:
            return None
        named = {name for name in _TEXTS if f"{{{name}}}" in self.user_text_template}
        values = {name: _SURVEY.get(row, where, name, kind=str) for name in named}
        if "{preferences}" in self.user_text_template:
            values["preferences"] = ", ".join(self._preferred(row, where))
        return filled(self.user_text_template, values)

    def _preferred(self, row: Mapping[str, Any], where: str) -> list[str]:
        column = "stated_prefs" if self.preferences == "rated" else "order_stated_prefs"
        options = _SURVEY.get(row, where, column, kind=dict)
        values = {name: value for name, value in options.items() if isinstance(value, int | float)}
        if not values:
            _SURVEY.fail(where, (column,), "holds no number")
        if self.preferences == "displayed":
            return [name for name, place in values.items() if place in (1, 2, 3)]
        values.pop("other", None)  # its meaning is free text in another column
        return sorted(values, key=lambda name: -values[name])[:3]

    def _dialogues(self) -> Iterator[_Dialogue]:
        for where, row in self._conversations.rows():
            user_id = _DIALOGUE.get(row, where, "user_id", kind=str)
            if user_id not in self._user_texts:
                _DIALOGUE.fail(where, ("user_id",), "is no user of the survey who completed a conversation")
            dialogue_id = _DIALOGUE.get(row, where, "conversation_id", kind=str)
            yield _Dialogue(where, dialogue_id, user_id, _turns(row, where))


def _turns(row: Mapping[str, Any], where: str) -> list[_Turn]:
    """Return the turns of a dialogue in order, each with its message and replies."""
    turns = [_Turn() for _ in range(_DIALOGUE.get(row, where, "conversation_turns", kind=int))]
    for i in range(len(_DIALOGUE.get(row, where, "conversation_history", kind=list))):
        path = ("conversation_history", i)
        number = _DIALOGUE.get(row, where, *path, "turn", kind=int)
        if not 0 <= number < len(turns):
            problem = f"is {number}, but 'conversation_turns' is {len(turns)}"
            _DIALOGUE.fail(where, (*path, "turn"), problem, "is not the number of turns")
        text, turn = _DIALOGUE.get(row, where, *path, "content", kind=str), turns[number]
        if _DIALOGUE.get(row, where, *path, "role", kind=str) != "user":
            (turn.chosen if _DIALOGUE.get(row, where, *path, "if_chosen", kind=bool) else turn.others).append(text)
        elif turn.asked is None:
            turn.asked = text
    return turns


def _share(total: int, held_out: float) -> int:
    return int(total * (1 - held_out))
