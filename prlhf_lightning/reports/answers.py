"""Answers of a model and its comparison writers for users, and their win rates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from prlhf_lightning.analysis.feedback_table import surface_features
from prlhf_lightning.analysis.judges import Judge, PairResult, Person, Question, UtilityJudge, Vote, judge_pair
from prlhf_lightning.analysis.votes import Floats
from prlhf_lightning.analysis.win_rate import UserMean, user_mean
from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.data.conversations import message_text
from prlhf_lightning.data.holdout import Pairs
from prlhf_lightning.data.records import Columns, FeedbackRecord, Text, parse_record
from prlhf_lightning.data.sources.base import Split, read
from prlhf_lightning.data.splits import spread
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.policies import Sampling
from prlhf_lightning.reports.pairs import rows_by_user
from prlhf_lightning.types import Tokens

OWN, GENERIC, BEFORE, BASELINE = "for this user", "generic user", "before training", "baseline without users"
_VOTES = 8
_BATCH = 32


@dataclass(frozen=True)
class Answers:
    """What was written.

    Attributes:
        prompts: P prompts.
        people: U users.
        texts: For each writer, U rows of P answers.
        utility: For each writer, the true utility of its answers by user; only for simulated users.
        well_formed: For each writer, the share of well-formed answers; only for simulated users.
    """

    prompts: Sequence[Text]
    people: Sequence[Person]
    texts: Mapping[str, Sequence[Sequence[str]]]
    utility: Mapping[str, UserMean]
    well_formed: Mapping[str, float]


@dataclass(frozen=True)
class WinRate:
    """Win rate of the answers for a user against other answers, according to a judge.

    Attributes:
        against: Writer of the other answers.
        rate: Mean over users of their scores (1, 0.5 for a tie, 0).
        wins: Number of questions won.
        ties: Number of ties, including those with different verdicts in the two orders.
        losses: Number lost.
        inconsistent: Number of ties with different verdicts in the two orders.
        errors: Number of questions without a verdict, by reason.
    """

    against: str
    rate: UserMean
    wins: int
    ties: int
    losses: int
    inconsistent: int
    errors: Mapping[str, int]


def find_people(data: PreferenceDataModule, pairs: Pairs, user_ids: Sequence[str]) -> tuple[list[Person], Tokens]:
    """Return users with the information for a judge: their text and some of their validation votes.

    Returns:
        The users with any information, and the tokens of their texts.
    """
    places = rows_by_user(pairs, user_ids, _VOTES)
    rows = {user_id: pairs.__getitems__(own) for user_id, own in places.items()}
    records = _records(data, {row["where"] for own in rows.values() for row in own})
    people = []
    for user_id, own in rows.items():
        found = [records[row["where"]] for row in own if row["where"] in records]
        text = next((record.user_text for record in found if record.user_text), "")
        votes = [Vote(one.prompt, one.chosen, one.rejected) for one in found if one.chosen and one.rejected]
        people.append(Person(user_id, text or "", tuple(votes)))
    return people, Tokens.from_lists([own[0]["user_text_ids"] for own in rows.values()])


def find_prompts(data: PreferenceDataModule, pairs: Pairs, count: int) -> list[Text]:
    """Return distinct validation prompts, spread evenly."""
    if isinstance(data.source, SimulatedSource):
        known = data.source.eval_prompts()
        return [known[place] for place in spread(len(known), count)]
    first = np.sort(np.unique(pairs.split.keys("prompt")[pairs.positions], return_index=True)[1])
    rows = pairs.__getitems__(first[spread(len(first), count)].tolist())
    records = _records(data, {row["where"] for row in rows})
    found = [records[row["where"]] for row in rows if row["where"] in records]
    if with_tools := sum(record.tools is not None for record in found):
        warnings.warn(
            f"{with_tools} of {len(found)} validation prompts have tools, and no answer to them is written for the "
            "report; `generate --prompts` writes some.",
            stacklevel=2,
        )
    return [record.prompt for record in found if record.tools is None]


def _records(data: PreferenceDataModule, wheres: set[str]) -> dict[str, FeedbackRecord]:
    """Return validation rows of the source, before tokenization."""
    columns = Columns.from_mapping(data.source.columns)
    found: dict[str, FeedbackRecord] = {}
    split: Split = "validation" if "validation" in data.source.splits() else "train"
    for where, row in read(data.source, split):
        if len(found) == len(wheres):
            break
        if where in wheres:
            found[where] = parse_record(row, where, columns, data.feedback)
    return found


class AnswerGenerator:
    """Generates answers with the different writers.

    Args:
        module: The trained model, in evaluation mode.
        data: Its data module, for the tokenization of prompts.
        sampling: Sampling settings.
        baseline: The same model trained without users.
    """

    def __init__(
        self,
        module: PersonalizedModel,
        data: PreferenceDataModule,
        sampling: Sampling,
        baseline: PersonalizedModel | None = None,
    ) -> None:
        self._module, self._data, self._sampling, self._baseline = module, data, sampling, baseline

    @property
    def writers(self) -> list[str]:
        """Names of the writers; the first is the model as trained."""
        module = self._module
        names = [OWN, GENERIC] if module.user_model.personalizes else [OWN]
        return [*names, *([BASELINE] if self._baseline else []), *([BEFORE] if module.loss.requires_reference else [])]

    def write(
        self,
        people: Sequence[Person],
        user_text: Tokens,
        prompts: Sequence[Text],
        on_answers: Callable[[int], object],
    ) -> dict[str, list[list[str]]]:
        """Return an answer of every writer to every prompt for every user.

        Args:
            people: U users.
            user_text: U texts about them.
            prompts: P prompts.
            on_answers: Called with the number of new answers.

        Returns:
            For each writer, U rows of P answers.
        """
        asked = self._data.encode_prompts(prompts)
        written: dict[str, list[list[str]]] = {}
        for writer in self.writers:
            # Writers without users generate once for all of them.
            same = writer != OWN and not self._module.user_model.uses_text
            rows = [(u, p) for u in range(1 if same else len(people)) for p in range(len(prompts))]
            texts: list[str] = []
            for start in range(0, len(rows), _BATCH):
                users, places = (torch.tensor(part) for part in zip(*rows[start : start + _BATCH], strict=True))
                names = [people[user].user_id for user in users.tolist()]
                prompt, about = asked.select(places), user_text.select(users)
                texts += self._write(writer, _to(prompt, self._module), names, _to(about, self._module))
                on_answers(len(names) * (len(people) if same else 1))
            own = [texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]
            written[writer] = own * len(people) if same else own
        return written

    @torch.no_grad()
    def _write(self, writer: str, prompt: Tokens, user_ids: list[str], user_text: Tokens) -> list[str]:
        module = self._module
        if writer == BASELINE and self._baseline is not None:
            return self._baseline.generate(prompt, user_ids, user_text, self._sampling)
        if writer == OWN:
            return module.generate(prompt, user_ids, user_text, self._sampling)
        users = module.users(user_ids, user_text, reference=writer == BEFORE)
        soft = module.user_model.reference(users) if writer == BEFORE else module.user_model.generic(users)
        tokens = module.policy.generate(prompt, soft, self._sampling, reference=writer == BEFORE)
        return module.texts_of(tokens, prompt)


def _to(tokens: Tokens, module: PersonalizedModel) -> Tokens:
    return tokens.to(module.device)


def with_utility(answers: Answers, judge: UtilityJudge, seed: int = 0) -> Answers:
    """Return the answers with the true utility of simulated users."""
    utility, well_formed = {}, {}
    for writer, texts in answers.texts.items():
        ids, found = [], []
        for person, own in zip(answers.people, texts, strict=True):
            for prompt, text in zip(answers.prompts, own, strict=True):
                ids.append(person.user_id)
                found.append(judge.utility(prompt, person, text))
        utility[writer] = user_mean(ids, [one.utility for one in found], seed)
        well_formed[writer] = sum(one.well_formed for one in found) / len(found)
    return replace(answers, utility=utility, well_formed=well_formed)


def features_written(answers: Answers) -> dict[str, Floats]:
    """Return the mean `[F]` of `SURFACE_FEATURES` of the answers for each user."""
    asked = [
        prompt if isinstance(prompt, str) else "\n".join(message_text(turn) for turn in prompt)
        for prompt in answers.prompts
    ]
    return {
        person.user_id: np.mean([surface_features(*both) for both in zip(asked, texts, strict=True)], axis=0)
        for person, texts in zip(answers.people, answers.texts[OWN], strict=True)
    }


def win_rates(answers: Answers, judge: Judge, seed: int, on_ruling: Callable[[], object]) -> list[WinRate]:
    """Return a judge's comparison of the answers for each user with those of every other writer.

    Args:
        answers: The generated answers.
        judge: The judge.
        seed: Seed of the bootstrap samples.
        on_ruling: Called after each comparison.
    """
    places = [(u, p) for u in range(len(answers.people)) for p in range(len(answers.prompts))]
    users = [answers.people[u].user_id for u, _ in places]
    results = []
    for writer, texts in answers.texts.items():
        if writer == OWN:
            continue
        own = answers.texts[OWN]
        questions = [Question(answers.prompts[p], answers.people[u], own[u][p], texts[u][p]) for u, p in places]
        results.append(_counted(writer, users, judge_pair(judge, questions, on_ruling), seed))
    return results


def _counted(against: str, users: Sequence[str], rulings: Sequence[PairResult], seed: int) -> WinRate:
    errors = [ruling.error for ruling in rulings if ruling.verdict is None]
    return WinRate(
        against,
        user_mean(users, [ruling.score for ruling in rulings], seed),
        wins=sum(ruling.verdict == "a" for ruling in rulings),
        ties=sum(ruling.verdict == "tie" for ruling in rulings),
        losses=sum(ruling.verdict == "b" for ruling in rulings),
        inconsistent=sum(not ruling.agrees for ruling in rulings),
        errors={error: errors.count(error) for error in dict.fromkeys(errors)},
    )
