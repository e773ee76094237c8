"""Data sources of simulated users with known preferences, so generated text can be judged exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.errors import ConfigurationError, Place
from prlhf_lightning.simulation.grammar import ATTRIBUTES, NOTE_WORDS, PROMPTS, STYLES, parse, render, sample
from prlhf_lightning.simulation.users import MAX_GROUPS, SimulatedUser, draw_tastes, draw_users, state_preference


@dataclass(frozen=True)
class Judgment:
    """Judgment of one text by one simulated user.

    Attributes:
        utility: True utility in [-1, 1]: 1 is the best text for this user, 0 the mean over texts of all styles (the
            score of a model without a style), -1 the worst; an ill-formed text gets -1.
        well_formed: Whether the text is exactly an answer of the style grammar to the prompt.
    """

    utility: float
    well_formed: bool


@dataclass(frozen=True)
class _Pair:
    user: SimulatedUser
    prompt: str
    chosen: str
    rejected: str

    @property
    def label_is_true(self) -> bool:
        return self.user.utility(self.prompt, self.chosen) > self.user.utility(self.prompt, self.rejected)


class SimulatedSource(DataSource):
    """Pairs judged by simulated users with hidden, conflicting preferences over the style grammar.

    Users form opposed groups of unequal size, so each style suits only a few of them; users also differ within a group
    (see `simulation.users.draw_users`). Both answers of a pair are sampled from the grammar, in uniformly drawn styles.
    A user prefers answer a to answer b with probability `sigmoid((u_a - u_b) / temperature)` (Bradley-Terry on true
    utilities; pairs of equal utility are drawn again). A fifth of the prompts is held out of training; validation pairs
    and `eval_prompts` use only these.

    Args:
        num_users: Users in training.
        pairs_per_user: Training pairs per user.
        validation_pairs_per_user: Validation pairs of each user, seen or unseen.
        num_unseen_users: Users with validation pairs only.
        groups: True number of groups, at most 8. If it is even, each group has an opposite group.
        group_shares: Relative size of each group, such as `[9, 1]` for a majority and an opposite minority; by default,
            the first group is about twice as large as the last.
        temperature: Noise of the choices; with 0.05, 97% of the labels agree with the true utilities.
        user_text: Add `user_text` with the user's three strongest preferences, for explicit user models.
        seed: Seed of users, prompts, answers and labels.
    """

    def __init__(
        self,
        num_users: int = 20,
        pairs_per_user: int = 60,
        validation_pairs_per_user: int = 30,
        num_unseen_users: int = 10,
        groups: int = 4,
        temperature: float = 0.05,
        user_text: bool = False,
        seed: int = 0,
        group_shares: list[float] | None = None,
    ) -> None:
        if not 1 <= groups <= min(MAX_GROUPS, num_users):
            raise ConfigurationError(
                f"SimulatedSource: groups={groups} is out of range; give a number from 1 to {MAX_GROUPS}, "
                f"and no more than num_users={num_users}."
            )
        if temperature <= 0:
            raise ConfigurationError(f"SimulatedSource: temperature={temperature} must be above 0.")
        if group_shares is not None and (len(group_shares) != groups or not all(share > 0 for share in group_shares)):
            raise ConfigurationError(
                f"SimulatedSource: group_shares={group_shares} does not fit groups={groups}; give a number above 0 for "
                "each group."
            )
        self.num_users = num_users
        self.pairs_per_user = pairs_per_user
        self.validation_pairs_per_user = validation_pairs_per_user
        self.num_unseen_users = num_unseen_users
        self.groups = groups
        self.group_shares = group_shares
        self.temperature = temperature
        self.user_text = user_text
        self.seed = seed

    def splits(self) -> set[Split]:
        """Return train and validation."""
        return {"train", "validation"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of each user in turn; in validation, unseen users come after the seen ones."""
        for user in self.seen_users + (self.unseen_users if split == "validation" else []):
            for number, pair in enumerate(self._pairs(split, user)):
                row = {"user_id": user.user_id, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
                if self.user_text:
                    row["user_text"] = user.stated_preference()
                yield Place(f"simulated {split}:{user.user_id}", number), row

    def fingerprint(self, split: Split) -> str:
        """Return the version of the grammar and the settings that the rows depend on."""
        pairs = self.pairs_per_user if split == "train" else self.validation_pairs_per_user
        settings = (self.num_users, pairs, self.num_unseen_users, self.groups, self.temperature, self.user_text)
        shares = f" shares {self.group_shares}" if self.group_shares else ""
        return f"SimulatedSource v1 {split} {settings} seed {self.seed}{shares}"

    @cached_property
    def seen_users(self) -> list[SimulatedUser]:
        """The users of the training split."""
        names = [f"user-{i + 1:02d}" for i in range(self.num_users)]
        return draw_users(names, self._tastes, Random(f"{self.seed} seen users"), self.group_shares)

    @cached_property
    def unseen_users(self) -> list[SimulatedUser]:
        """The users with validation pairs only."""
        names = [f"unseen-{i + 1:02d}" for i in range(self.num_unseen_users)]
        return draw_users(names, self._tastes, Random(f"{self.seed} unseen users"), self.group_shares)

    def judge(self, user_id: str, prompt: str, completion: str) -> Judgment:
        """Judge a completion, given as text without special tokens, for a user.

        Generate with a limit above `grammar.MAX_WORDS` tokens: a text without an end token is then longer than any text
        of the grammar, and so ill-formed.
        """
        user = self._user_by_id[user_id]
        return Judgment(user.utility(prompt, completion), parse(prompt, completion) is not None)

    def noise_ceiling(self, split: Split = "validation", unseen: bool = False) -> float:
        """Return the accuracy of the true utilities on the noisy labels of the seen (or unseen) users."""
        users = self.unseen_users if unseen else self.seen_users
        hits = [pair.label_is_true for user in users for pair in self._pairs(split, user)]
        return sum(hits) / len(hits)

    def eval_prompts(self) -> list[str]:
        """Return the held-out prompts."""
        return self._prompts("validation")

    def contrasting_users(self, n: int = 3) -> list[SimulatedUser]:
        """Return n seen users with different preferences: the first user, then repeatedly the farthest user."""
        taken = self.seen_users[:1]
        while len(taken) < min(n, self.num_users):
            rest = [user for user in self.seen_users if user not in taken]
            taken.append(max(rest, key=lambda user: min(math.dist(user.weights, other.weights) for other in taken)))
        return taken

    @cached_property
    def _tastes(self) -> list[tuple[float, ...]]:
        return draw_tastes(self.groups, Random(f"{self.seed} tastes"))

    @cached_property
    def _user_by_id(self) -> dict[str, SimulatedUser]:
        return {user.user_id: user for user in self.seen_users + self.unseen_users}

    def _prompts(self, split: Split) -> list[str]:
        held_out = set(Random(f"{self.seed} prompts").sample(PROMPTS, len(PROMPTS) // 5))
        return [prompt for prompt in PROMPTS if (prompt in held_out) == (split == "validation")]

    def _pairs(self, split: Split, user: SimulatedUser) -> Iterator[_Pair]:
        # One random generator per user and split, so more pairs or users do not change those already drawn.
        rng = Random(f"{self.seed} {split} {user.user_id}")
        prompts = self._prompts(split)
        for _ in range(self.pairs_per_user if split == "train" else self.validation_pairs_per_user):
            yield self._judged_pair(user, rng.choice(prompts), rng)

    def _judged_pair(self, user: SimulatedUser, prompt: str, rng: Random) -> _Pair:
        margin = 0.0
        while abs(margin) < 1e-9:
            first, second = sample(prompt, rng), sample(prompt, rng)
            margin = user.utility(prompt, first) - user.utility(prompt, second)
        # sigmoid, in a form that does not overflow at a very small temperature
        first_wins = rng.random() < 0.5 * (1 + math.tanh(0.5 * margin / self.temperature))
        return _Pair(user, prompt, *((first, second) if first_wins else (second, first)))


class StyleCorpus(DataSource):
    """Answers in all styles, equally often, to pretrain the language model of the simulation.

    The corpus contains no user preferences. A third of the prompts have no prefix, and the styles of their answers are
    uniform. A third follow a stated preference, such as `I like short and warm answers.`. A third follow loose notes,
    such as `garden warm oven short`, in which only some words name a style. The answer then has the named styles;
    other attributes are uniform. So the model follows a request anywhere before the prompt, as instruction-tuned models
    do, and prefers no style without one.

    Args:
        num_rows: Rows of the training split; validation has a twentieth as many.
        seed: Seed of prompts and answers.
    """

    def __init__(self, num_rows: int = 200_000, seed: int = 0) -> None:
        self.num_rows = num_rows
        self.seed = seed

    def splits(self) -> set[Split]:
        """Return train and validation."""
        return {"train", "validation"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield rows with an empty `rejected`."""
        rng = Random(f"{self.seed} corpus {split}")
        for number in range(self.num_rows if split == "train" else self.num_rows // 20):
            prompt, style = rng.choice(PROMPTS), rng.choice(STYLES)
            wishes = [getattr(style, name) for name in rng.sample(list(ATTRIBUTES), rng.randint(0, len(ATTRIBUTES)))]
            row = {
                "user_id": "anyone",
                "prompt": rng.choice((_no_lead, _stated_lead, _noted_lead))(wishes, rng) + prompt,
                "chosen": render(prompt, style, rng),
                "rejected": "",
            }
            yield Place(f"style corpus {split}", number), row

    def fingerprint(self, split: Split) -> str:
        """Return the version of the grammar and the settings that the rows depend on."""
        return f"StyleCorpus v1 {split} {self.num_rows} seed {self.seed}"


def _no_lead(wishes: list[str], rng: Random) -> str:
    return ""


def _stated_lead(wishes: list[str], rng: Random) -> str:
    return state_preference(wishes) + " " if wishes else ""


def _noted_lead(wishes: list[str], rng: Random) -> str:
    words = [*wishes, *rng.choices(NOTE_WORDS, k=rng.randint(0, 8))]
    return "".join(f"{word} " for word in rng.sample(words, len(words)))
