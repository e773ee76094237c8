"""A judge that uses the reward of a trained model."""

from __future__ import annotations

from pathlib import Path

from prlhf_lightning.analysis.judges.base import Judge, Person, Verdict
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.records import Text
from prlhf_lightning.errors import JudgeError
from prlhf_lightning.training import checkpoint_files, load_scorer


class RewardJudge(Judge):
    """The reward of a trained model: a reward model's, or a policy's implicit `beta log pi(y|x, u) / pi_ref(y|x)`.

    Do not let a model judge its own answers, which it prefers. Use one that was trained on other votes of the same
    users, or with another seed. Nor let a reward model judge answers that were chosen or trained by it.

    Args:
        model: A checkpoint of `fit`, or the folder of its run: a reward model, or a policy with a pairwise loss, that
            knows the users.
        device: Its device.
        trust_classes: Classes of your own that the model was trained with; their modules are imported.
    """

    position_sensitive = False

    def __init__(self, model: Path, device: str = "cpu", trust_classes: list[str] | None = None) -> None:
        self.model, self.device, self.trust_classes = Path(model), device, trust_classes
        self.caveat = f"The judge is a model that was trained itself ({self.model.name}), and can be gamed."

    def prepare(self, data: PreferenceDataModule) -> None:
        """Load the model."""
        self.model = checkpoint_files.checkpoint_of(self.model, "judge")
        self._scorer = load_scorer(self.model, self.device, self.trust_classes, "judge")

    def margin(self, prompt: Text, user: Person, a: str, b: str) -> float:
        """Return the reward of answer `a` minus that of answer `b`."""
        if not self._scorer.knows(user.user_id):
            raise JudgeError("the judge's checkpoint does not know this user")
        if not a or not b:
            raise JudgeError("an answer is empty, so that it has no reward")
        scored = self._scorer.scored([user.user_id] * 2, [prompt] * 2, [a, b], [user.text] * 2)
        if scored.problems:
            raise JudgeError("; ".join(dict.fromkeys(scored.problems.values())))
        return float(scored.rewards[0] - scored.rewards[1])

    def judge(self, prompt: Text, user: Person, a: str, b: str) -> Verdict:
        """Return the answer of higher reward."""
        margin = self.margin(prompt, user, a, b)
        return "tie" if margin == 0 else "a" if margin > 0 else "b"
