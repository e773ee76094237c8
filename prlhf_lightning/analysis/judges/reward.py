"""A judge that uses the reward of a trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from prlhf_lightning.analysis.judges.base import Judge, Person, Verdict
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.records import FeedbackRecord, Text
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError, JudgeError
from prlhf_lightning.training import PersonalizedLM, checkpoint_files


class RewardJudge(Judge):
    """The implicit personalized reward of a trained model: `beta log pi(y|x, u) / pi_ref(y|x)`, or that of its loss.

    Do not let a model judge its own answers, which it prefers. Use one that was trained on other votes of the same
    users, or with another seed.

    Args:
        model: A checkpoint of `fit`, or the folder of its run: a model with a pairwise loss that knows the users.
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
        if not self.model.is_file():
            raise ConfigurationError(f"judge: there is no checkpoint {self.model}; give one that `fit` wrote.")
        content = checkpoint_files.load(self.model, mmap=True)
        try:
            model = PersonalizedLM.from_content(content, trust_classes=self.trust_classes)
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"judge: {self.model} cannot be loaded: {error}") from error
        if model.loss.feedback != "pairs":
            raise ConfigurationError(
                f"judge: {type(model.loss).__name__} of {self.model} ranks no pairs; give a checkpoint of a "
                "preference loss."
            )
        self._model = model.eval().to(self.device)
        self._tokenize = FeedbackTokenizer(model.policy.tokenizer, model.tokenization)

    @torch.no_grad()
    def margin(self, prompt: Text, user: Person, a: str, b: str) -> float:
        """Return the reward of answer `a` minus that of answer `b`."""
        if self._model.vocabulary is None or user.user_id not in self._model.vocabulary:
            raise JudgeError("the judge's checkpoint does not know this user")
        if not a or not b:
            raise JudgeError("an answer is empty, so that it has no reward")
        a, b = (text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for text in (a, b))  # type: ignore[assignment]
        ids = self._tokenize([FeedbackRecord(user.user_id, prompt, a, b, user.text or None)], ["judge"])[0]
        self._tokenize.forget()
        if ids is None:
            raise JudgeError("prompt and answers are longer than the judge takes")
        row = {f"{name}_ids": getattr(ids, name) for name in ("user_text", "prompt", "chosen", "rejected")}
        batch = collate([{"user_id": user.user_id, "record": 0, **row}]).to(self.device)
        own = self._model.objective(batch, every_term=True)[1][0]
        return float(own.margins[0])

    def judge(self, prompt: Text, user: Person, a: str, b: str) -> Verdict:
        """Return the answer of higher reward."""
        margin = self.margin(prompt, user, a, b)
        if margin != margin:
            raise JudgeError("the reward is NaN")
        return "tie" if margin == 0 else "a" if margin > 0 else "b"
