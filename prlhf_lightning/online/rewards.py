"""Rewards of answers: functions, models, and their weighted sum."""

from __future__ import annotations

import asyncio
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.errors import ConfigurationError

_EPSILON = 1e-4  # as in the advantages of GRPO


class RewardFunction(ABC):
    """SUBCLASS HERE: a reward that must know the data, or has settings. A plain function needs no class."""

    def prepare(self, data: PreferenceDataModule) -> None:  # noqa: B027 - most rewards need nothing
        """Prepare for the users and prompts of the data; called once, before the first answer.

        Raises:
            ConfigurationError: This reward cannot score these users.
        """

    @abstractmethod
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        """Return the reward of each answer; see `Reward.function`."""


@dataclass(frozen=True)
class Reward:
    """A reward and its weight in the sum.

    Attributes:
        function: A function, a `RewardFunction`, or another callable object, called as TRL calls its reward functions:
            `function(prompts=..., completions=..., completion_ids=..., **columns)`, where `columns` are lists of the
            columns of the rows, `user_id` among them; also with `trainer_state`, a `TrainerState` of transformers, and
            `log_metric(name, value)`. It returns a number for each answer, or None for an answer that it does not
            judge. It may be async. In conversations, a completion is a list with one message.
        weight: Its weight in the sum.
        normalize: Subtract the mean of the answers to the same row and divide by their standard deviation, before the
            sum. For rewards of different scales.
        name: Its name in logs; by default the name of the function.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    normalize: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        """Refuse weights that are not finite."""
        if not math.isfinite(self.weight):
            raise ConfigurationError(f"model.rewards: the weight of {self.title} is {self.weight}; give a number.")

    @property
    def title(self) -> str:
        """Its name in logs."""
        return self.name or str(getattr(self.function, "__name__", type(self.function).__name__))


@dataclass(frozen=True)
class Failure:
    """An answer that a reward could not score.

    Attributes:
        answer: Its number in the batch.
        reward: Name of the reward.
        reason: What went wrong.
    """

    answer: int
    reward: str
    reason: str


@dataclass(frozen=True)
class Scores:
    """Rewards of B answers.

    Attributes:
        total: `[B]` float32 weighted sums; NaN for an answer without a score.
        parts: Each reward's own values `[B]` by name, before normalization and weighting; NaN where it gave none.
        failures: Answers for which a reward raised an error or was not finite.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    failures: Sequence[Failure] = field(default=())


@dataclass(frozen=True)
class Judged:
    """B answers with their scores.

    Attributes:
        scores: The scores.
        prompts: B prompts, as in the data.
        texts: B answers.
    """

    scores: Scores
    prompts: Sequence[Any]
    texts: Sequence[str]


class RewardSum:
    """The weighted sum of rewards.

    A reward that returns None for an answer is left out of this answer's sum, as in TRL. An answer that no reward
    scores, or for which one fails, has no score: it costs this answer alone.

    Args:
        rewards: The rewards; their names must differ.

    Raises:
        ConfigurationError: There are none, or two have the same name.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ConfigurationError("model.rewards is empty; name at least one reward.")
        names = [reward.title for reward in rewards]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigurationError(f"model.rewards: {min(twice)} stands there twice; give each a `name` of its own.")
        self.rewards = tuple(rewards)

    def prepare(self, data: Any) -> None:
        """Prepare each reward for the data."""
        for reward in self.rewards:
            if isinstance(reward.function, RewardFunction):
                reward.function.prepare(data)

    @property
    def columns(self) -> set[str]:
        """Names of the columns that the rewards name as arguments."""
        return {name for reward in self.rewards for name in inspect.signature(reward.function).parameters}

    def __call__(
        self, answers: Mapping[str, Sequence[Any]], copies: int = 1, common: Mapping[str, Any] | None = None
    ) -> Scores:
        """Return the scores of B answers.

        Args:
            answers: Arguments of the functions by name, each a sequence of B values.
            copies: Answers to each row, next to one another, for normalization.
            common: Arguments that do not belong to single answers.

        Raises:
            ConfigurationError: A reward failed for every answer, or did not return a list with a value for each.
        """
        count = len(answers["completions"])
        total, scored = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
        parts, failures = {}, list[Failure]()
        outputs = _outputs(self.rewards, answers, common or {})
        for reward, output in zip(self.rewards, outputs, strict=True):
            if isinstance(output, Exception):
                output = _one_by_one(reward, answers, common or {}, output)
            values, failed = _values(reward, output, count)
            failures += failed
            parts[reward.title] = values.float()
            given = ~values.isnan()
            scored |= given
            shown = _normalized(values, copies) if reward.normalize else values
            total += torch.where(given, reward.weight * shown, 0.0)
        scored[[failure.answer for failure in failures]] = False
        return Scores(torch.where(scored, total, torch.nan).float(), parts, failures)


def _values(reward: Reward, output: Any, count: int) -> tuple[Tensor, list[Failure]]:
    """Return a reward's values `[B]` float64, NaN where there is none, and its failures.

    Args:
        reward: The reward.
        output: What it returned for B answers; an exception is a failure of its answer.
        count: B.

    Raises:
        ConfigurationError: They are not a value for each answer, or none of these is a number.
    """
    found = _listed(reward, output)
    if len(found) != count:
        raise ConfigurationError(
            f"model.rewards: {reward.title} returned {len(found)} values for {count} completions; return one for each, "
            "None for a completion that it does not judge."
        )
    values, failures, unreadable = torch.full((count,), torch.nan, dtype=torch.float64), [], 0
    for place, value in enumerate(found):
        if value is None:
            continue
        try:
            values[place] = number = _number(value)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with several numbers
            failures.append(Failure(place, reward.title, str(error)))
            unreadable += 1
            continue
        if not math.isfinite(number):
            values[place] = torch.nan
            failures.append(Failure(place, reward.title, f"it is {number}"))
    if unreadable == count:
        raise ConfigurationError(
            f"model.rewards: {reward.title} gives no number for any of the {count} answers of a batch "
            f"({failures[0].reason}); return a number for each, None for a completion that it does not judge."
        )
    return values, failures


def _listed(reward: Reward, output: Any) -> list[Any]:
    if isinstance(output, (str, bytes, Mapping, Set)):  # a list of these would be of characters or keys
        return _refuse(reward, output)
    try:
        return list(output)
    except TypeError:  # a single number, or a tensor of one
        return _refuse(reward, output)


def _refuse(reward: Reward, output: Any) -> NoReturn:
    raise ConfigurationError(
        f"model.rewards: {reward.title} returned a value of type {type(output).__name__}; return a list with a number "
        "for each completion, None for a completion that it does not judge."
    )


def _number(value: Any) -> float:
    if isinstance(value, Exception):
        raise ValueError(repr(value))
    return float(value)


def _one_by_one(
    reward: Reward, answers: Mapping[str, Sequence[Any]], common: Mapping[str, Any], error: Exception
) -> list[Any]:
    """Score answer by answer, so that an error costs only the answers that cause it: it stands in place of a value."""
    found: list[Any] = []
    for place in range(len(answers["completions"])):
        one = {name: values[place : place + 1] for name, values in answers.items()}
        (output,) = _outputs([reward], one, common)
        found += [output] if isinstance(output, Exception) else _listed(reward, output)
    if all(isinstance(value, Exception) for value in found):
        raise ConfigurationError(
            f"model.rewards: {reward.title} fails for all {len(found)} answers of a batch: {error!r}. It is called as "
            "function(prompts=..., completions=..., **columns), and returns a number or None for each completion."
        ) from error
    return found


def _outputs(
    rewards: Sequence[Reward], answers: Mapping[str, Sequence[Any]], common: Mapping[str, Any]
) -> list[Any | Exception]:
    """Return what each reward returns for B answers, or the exception that it raises; async ones run together."""
    outputs: list[Any] = []
    for reward in rewards:
        try:
            outputs.append(reward.function(**_arguments(reward.function, answers, common)))
        except ConfigurationError:
            raise
        except Exception as error:
            outputs.append(error)
    waiting = [number for number, output in enumerate(outputs) if inspect.isawaitable(output)]
    if waiting:
        with ThreadPoolExecutor(1) as pool:  # this thread may have a loop of its own, as in a notebook
            found = pool.submit(asyncio.run, _together([outputs[number] for number in waiting])).result()
        for number, output in zip(waiting, found, strict=True):
            if isinstance(output, ConfigurationError):
                raise output
            outputs[number] = output
    return outputs


async def _together(waiting: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def _arguments(
    function: Callable[..., Any], answers: Mapping[str, Sequence[Any]], common: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a function: those that it names, or all if it takes any."""
    given = {**{name: list(values) for name, values in answers.items()}, **common}
    taken = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        return given
    return {name: value for name, value in given.items() if name in taken}


def _normalized(values: Tensor, copies: int) -> Tensor:
    """Return values `[B]` minus the mean and divided by the deviation of their row's answers, NaN left out."""
    groups = values.view(-1, copies)
    given = ~groups.isnan()
    counts = given.sum(1, keepdim=True)
    centered = groups - torch.nan_to_num(groups).sum(1, keepdim=True) / counts.clamp(min=1)
    squares = torch.nan_to_num(centered).square().sum(1, keepdim=True)
    deviation = (squares / (counts - 1).clamp(min=1)).sqrt()
    return (centered / (deviation + _EPSILON)).flatten()


class UtilityReward(RewardFunction):
    """The true utility of an answer for a simulated user, for the data of `SimulatedSource`.

    It is 1 for the best text for this user, 0 for the mean over all styles, and -1 for an ill-formed text.
    """

    def prepare(self, data: PreferenceDataModule) -> None:
        """Set the users from the source."""
        if not isinstance(data.source, SimulatedSource):
            raise ConfigurationError(
                "model.rewards: UtilityReward knows the users of SimulatedSource, and these are of "
                f"{type(data.source).__name__}; take a reward model or a function."
            )
        self._source = data.source
        users = data.source.seen_users + data.source.unseen_users
        self._named = {data.known_as(user.user_id): user.user_id for user in users}

    def __call__(  # type: ignore[override]
        self, prompts: Sequence[str], completions: Sequence[str], user_id: Sequence[str], **columns: Any
    ) -> list[float]:
        """Return the utilities."""
        rows = zip(user_id, prompts, completions, strict=True)
        return [self._source.judge(self._named[user], prompt, text).utility for user, prompt, text in rows]
