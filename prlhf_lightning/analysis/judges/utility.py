"""A judge that uses the true utility of simulated users."""

from __future__ import annotations

from prlhf_lightning.analysis.judges.base import Judge, Person, Verdict
from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.data.records import Text
from prlhf_lightning.data.sources.simulated import Judgment
from prlhf_lightning.errors import ConfigurationError, JudgeError

_SAME = 1e-9


class UtilityJudge(Judge):
    """Simulated users, whose true utility of every text is known; for the data of `SimulatedSource` only."""

    position_sensitive = False

    @property
    def name(self) -> str:
        """The name of the judge."""
        return "UtilityJudge (what the simulated users truly like)"

    def prepare(self, data: PreferenceDataModule) -> None:
        """Set the users from the source."""
        if not isinstance(data.source, SimulatedSource):
            raise ConfigurationError(
                f"judge: UtilityJudge knows the users of SimulatedSource, and these are of {type(data.source).__name__}"
                "; take RewardJudge or OpenAIJudge."
            )
        self._source = data.source
        users = data.source.seen_users + data.source.unseen_users
        self._named = {data.known_as(user.user_id): user.user_id for user in users}

    def utility(self, prompt: Text, user: Person, answer: str) -> Judgment:
        """Return a user's judgment of one answer.

        Raises:
            JudgeError: The user does not exist, or the prompt is not a string.
        """
        if user.user_id not in self._named or not isinstance(prompt, str):
            raise JudgeError("the source does not know this user or prompt")
        return self._source.judge(self._named[user.user_id], prompt, answer)

    def judge(self, prompt: Text, user: Person, a: str, b: str) -> Verdict:
        """Return the answer with the higher true utility."""
        margin = self.utility(prompt, user, a).utility - self.utility(prompt, user, b).utility
        return "tie" if abs(margin) < _SAME else "a" if margin > 0 else "b"
