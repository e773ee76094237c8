"""Data source of simulated users who judge any pool of answers by any scores; their preferences are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from random import Random
from typing import Any, NamedTuple

from prlhf_lightning.data.sources.base import DataSource, Split
from prlhf_lightning.data.sources.candidate_pool import Candidates, Pool, finite, pairs_in_random_order
from prlhf_lightning.data.sources.derived import left_out
from prlhf_lightning.data.sources.files import FileSource, Paths
from prlhf_lightning.data.splits import text_key
from prlhf_lightning.errors import ConfigurationError, Place
from prlhf_lightning.simulation.scores import SCORES, Score
from prlhf_lightning.simulation.users import Member, draw_members, draw_votes

_SAME = 1e-9  # utilities that differ by less are equal


class _Vote(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    gap: float  # of true utilities; negative if noise flipped the label


class PoolSource(DataSource):
    """Pairs of answers from a pool, judged by simulated users.

    A user belongs to a hidden group. The user's utility of an answer is the weighted sum of its scores, each divided by
    its standard deviation among the answers to one prompt. For two random answers to a prompt, the user prefers a to b
    with probability `sigmoid((u_a - u_b) / temperature)` (Bradley-Terry); a share `label_noise` of the labels is then
    flipped. No user judges a pair twice, or answers of equal utility. Prompts are split between training and validation
    by their text.

    The pool is held in memory. Rows with the same prompt are merged.

    Args:
        pool: File or files of rows with `prompt` (a text), `responses` (a list of texts), and any lists of numbers,
            one per response, that `groups` use as scores.
        groups: For each hidden group, the weight of each score, such as `[{characters: 1}, {characters: -1}]`: one
            group prefers longer answers, the other shorter ones. Scores are columns of the pool, `scores`, or those of
            `prlhf_lightning.simulation.scores`.
        scores: Name to function (or callable object) of prompt and answer.
        shares: Relative size of each group; equal by default.
        spread: Difference between users of a group: each weight is multiplied by a number from `1 - spread` to `1 +
            spread`.
        user_texts: `user_text` of the users of each group.
        num_users: Users of the training split, without the cold ones.
        votes_per_user: Their mean number of training pairs.
        zipf: Exponent of Zipf's law for the number of pairs per user; 0 gives all users equally many.
        num_cold_users: Users of the training split with few pairs.
        votes_per_cold_user: Training pairs of each cold user.
        num_unseen_users: Users with validation pairs only.
        validation_votes_per_user: Validation pairs of each user of any kind.
        validation_fraction: Share of the prompts held out for validation.
        temperature: Noise of the choices, in standard deviations of utility; near 0 the better answer always wins.
        label_noise: Share of labels that are flipped, whatever the utilities.
        seed: Seed of the held-out prompts, users, votes, pairs and labels.
        columns: Column names of the pool that differ from `prompt` and `responses`.
    """

    def __init__(
        self,
        pool: Paths,
        groups: Sequence[Mapping[str, float]],
        scores: Mapping[str, Score] | None = None,
        shares: Sequence[float] | None = None,
        spread: float = 0.2,
        user_texts: Sequence[str] | None = None,
        num_users: int = 20,
        votes_per_user: int = 60,
        zipf: float = 0.0,
        num_cold_users: int = 0,
        votes_per_cold_user: int = 3,
        num_unseen_users: int = 10,
        validation_votes_per_user: int = 30,
        validation_fraction: float = 0.2,
        temperature: float = 0.2,
        label_noise: float = 0.0,
        seed: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self._names_in_pool = {"prompt": "prompt", "responses": "responses", **(columns or {})}
        if unknown := sorted(self._names_in_pool.keys() - {"prompt", "responses"}):
            raise ConfigurationError(f"columns: there is no field {unknown[0]!r}; a pool has prompt and responses.")
        self.groups = [dict(group) for group in groups]
        self.shares = list(shares) if shares is not None else [1.0] * len(groups)
        self.spread = spread
        self.user_texts = None if user_texts is None else list(user_texts)
        self.num_users, self.votes_per_user, self.zipf = num_users, votes_per_user, zipf
        self.num_cold_users, self.votes_per_cold_user = num_cold_users, votes_per_cold_user
        self.num_unseen_users, self.validation_votes_per_user = num_unseen_users, validation_votes_per_user
        self.validation_fraction = validation_fraction
        self.temperature, self.label_noise = temperature, label_noise
        self.seed = seed
        self._check()
        self._settings = sorted(vars(self).items())
        self.scores = dict(scores or {})
        self._file = FileSource(pool)

    def _check(self) -> None:
        """Reject values out of range."""
        cares = [any(group.values()) and all(map(math.isfinite, group.values())) for group in self.groups]
        lists = {"shares": self.shares, "user_texts": self.user_texts or self.shares}
        wrong = [
            (not cares or not all(cares), "groups", "at least one group, and each a weight that is not 0"),
            *((len(made) != len(self.groups), name, "as many as groups") for name, made in lists.items()),
            (min(self.shares, default=1) <= 0, "shares", "numbers above 0"),
            (not 0 <= self.spread < 1, "spread", "a number from 0 to below 1"),
            (not 0 <= self.label_noise < 0.5, "label_noise", "a number from 0 to below 0.5"),
            (not self.temperature > 0, "temperature", "a number above 0"),
            (not 0 <= self.zipf < math.inf, "zipf", "a number from 0"),
            (not 0 < self.validation_fraction < 1, "validation_fraction", "a number between 0 and 1"),
            (self.num_users < 1, "num_users", "a number from 1"),
            (self.votes_per_user < 1, "votes_per_user", "a number from 1"),
            (self.num_cold_users < 0, "num_cold_users", "a number from 0"),
            (self.votes_per_cold_user < 1, "votes_per_cold_user", "a number from 1"),
            (self.num_unseen_users < 0, "num_unseen_users", "a number from 0"),
            (self.validation_votes_per_user < 0, "validation_votes_per_user", "a number from 0"),
        ]
        for is_wrong, name, right in wrong:
            if is_wrong:
                raise ConfigurationError(f"PoolSource: {name}={getattr(self, name)!r}; give {right}.")

    def splits(self) -> set[Split]:
        """Return train and validation."""
        return {"train", "validation"}

    def rows(self, split: Split) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the pairs of each user in turn: regular users, cold users and, in validation, unseen users."""
        for member in self.users + (self.unseen_users if split == "validation" else []):
            for number, vote in enumerate(self._votes(split, member)):
                row = {
                    "user_id": member.user_id,
                    "prompt": vote.prompt,
                    "chosen": vote.chosen,
                    "rejected": vote.rejected,
                }
                if self.user_texts is not None:
                    row["user_text"] = self.user_texts[member.group]
                yield Place(f"pool {split}:{member.user_id}", number), row

    def fingerprint(self, split: Split) -> str:
        """Return a hash of the settings and of all answers with their scores."""
        digest = sha256(f"PoolSource v1 {split} {self._settings}".encode())
        for candidates in self._pool.candidates.values():
            digest.update(repr(candidates).encode())
        return digest.hexdigest()

    def counts(self, split: Split) -> dict[str, int]:
        """Return the number of prompts with too few answers for a pair."""
        return {left_out("prompts of the pool with fewer than two answers"): few} if (few := self._pool.few) else {}

    @cached_property
    def users(self) -> list[Member]:
        """The users of the training split, the cold ones last."""
        return self._draw("user", self.num_users) + self._draw("cold", self.num_cold_users)

    @cached_property
    def unseen_users(self) -> list[Member]:
        """The users with validation pairs only."""
        return self._draw("unseen", self.num_unseen_users)

    def utility(self, user_id: str, prompt: str, answer: str) -> float:
        """Return a user's utility of an answer, from the pool or not.

        Only differences between answers to one prompt are meaningful; their unit is a standard deviation.

        Raises:
            ConfigurationError: The answer is not in the pool, and a score is a column of the pool.
        """
        member, known = self._by_id[user_id], self._pool.candidates.get(prompt)
        if known is not None and answer in known.answers:
            return member.utility(known.scores[known.answers.index(answer)])
        if missing := [name for name in self._names if name not in self._functions]:
            raise ConfigurationError(
                f"PoolSource: the score {missing[0]!r} is only known for the pool's answers; give a function in scores."
            )
        values = [finite(self._functions[name](prompt, answer), name, "the answer") for name in self._names]
        return member.utility(self._pool.scaled(values))

    def noise_ceiling(self, split: Split = "validation", unseen: bool = False) -> float:
        """Return the share of labels that agree with the true utilities, for training (or unseen) users."""
        users = self.unseen_users if unseen else self.users
        hits = [vote.gap > 0 for member in users for vote in self._votes(split, member)]
        if not hits:
            raise ConfigurationError(f"PoolSource: there are no such votes in {split}.")
        return sum(hits) / len(hits)

    @cached_property
    def _names(self) -> list[str]:
        """The scores used by `groups`, in order of first use."""
        return list(dict.fromkeys(name for group in self.groups for name in group))

    @cached_property
    def _functions(self) -> dict[str, Score]:
        return {**SCORES, **self.scores}

    @cached_property
    def _pool(self) -> Pool:
        rows = ((where, self._renamed(row)) for where, row in self._file.rows("train"))
        return Pool(rows, self._names, self._functions)

    def _renamed(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, **{field: row[name] for field, name in self._names_in_pool.items() if name in row}}

    @cached_property
    def _asked(self) -> dict[Split, list[Candidates]]:
        """The prompts of each split."""
        ranked = sorted(self._pool.candidates, key=lambda prompt: (text_key(f"{self.seed} {prompt}"), prompt))
        count = round(self.validation_fraction * len(ranked))
        if not 0 < count < len(ranked):
            raise ConfigurationError(
                f"PoolSource: of the {len(ranked)} prompts of the pool {count} fall to validation and "
                f"{len(ranked) - count} to training; add prompts, or change validation_fraction."
            )
        held_out = set(ranked[:count])
        train = [one for prompt, one in self._pool.candidates.items() if prompt not in held_out]
        return {"train": train, "validation": [self._pool.candidates[prompt] for prompt in ranked[:count]]}

    @cached_property
    def _by_id(self) -> dict[str, Member]:
        return {member.user_id: member for member in self.users + self.unseen_users}

    @cached_property
    def _training_votes(self) -> dict[str, int]:
        votes = draw_votes(self.num_users, self.votes_per_user, self.zipf, Random(f"{self.seed} votes"))
        votes += [self.votes_per_cold_user] * self.num_cold_users
        return {member.user_id: count for member, count in zip(self.users, votes, strict=True)}

    def _draw(self, name: str, count: int) -> list[Member]:
        names = [f"{name}-{number:0{len(str(count))}d}" for number in range(1, count + 1)]
        weights = [[group.get(score, 0.0) for score in self._names] for group in self.groups]
        return draw_members(names, weights, self.shares, self.spread, Random(f"{self.seed} {name} users"))

    def _votes(self, split: Split, member: Member) -> Iterator[_Vote]:
        wanted = self._training_votes[member.user_id] if split == "train" else self.validation_votes_per_user
        rng = Random(f"{self.seed} {split} {member.user_id}")
        voted = 0
        for candidates, (first, second) in pairs_in_random_order(self._asked[split], rng):
            if voted == wanted:
                return
            gap = member.utility(candidates.scores[first]) - member.utility(candidates.scores[second])
            if abs(gap) < _SAME:
                continue
            # sigmoid, in a form that does not overflow at a very small temperature
            first_wins = rng.random() < 0.5 * (1 + math.tanh(0.5 * gap / self.temperature))
            first_wins ^= rng.random() < self.label_noise
            chosen, rejected = (first, second) if first_wins else (second, first)
            answers = candidates.answers
            yield _Vote(candidates.prompt, answers[chosen], answers[rejected], gap if first_wins else -gap)
            voted += 1
        if voted < wanted:
            raise ConfigurationError(
                f"PoolSource: {member.user_id} needs {wanted} pairs in {split}, but only {voted} pairs of answers "
                "differ in utility for this user; enlarge the pool, or lower the numbers of votes (or zipf)."
            )
