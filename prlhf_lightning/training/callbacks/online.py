"""Callbacks of online RL: guards against collapse, and a table of answers as training goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.loggers import run_folder
from prlhf_lightning.training.online_module import OnlineRL
from prlhf_lightning.utils.io import append_whole

_PATIENCE = 3  # consecutive readings, since one batch may be an exception


@dataclass(frozen=True)
class _Sign:
    """A sign that training goes wrong.

    Attributes:
        setting: Name of its limit.
        value: Name of the logged value.
        finding: Meaning of a value beyond the limit.
        advice: What to try.
        above: Whether large values are bad, not small ones.
        relative: Whether the limit is a multiple of the value before training.
    """

    setting: str
    value: str
    finding: str
    advice: str
    above: bool = True
    relative: bool = False


_SIGNS = (
    _Sign(
        "longest",
        "length",
        "answers have become much longer, as they do when a reward favors length",
        "add a reward that counts length, raise model.loss.beta, or lower model.optim.lr",
        relative=True,
    ),
    _Sign(
        "truncated",
        "truncated",
        "many answers reach model.sampling.max_new_tokens without an end",
        "raise model.sampling.max_new_tokens, or set model.mask_truncated: true",
    ),
    _Sign(
        "entropy",
        "entropy",
        "the policy writes nearly the same answer each time, so that there is nothing left to compare",
        "lower model.optim.lr and model.optim.user_lr, raise model.loss.beta, or stop earlier",
        above=False,
        relative=True,
    ),
    _Sign(
        "without_spread",
        "without_spread",
        "almost all prompts get answers of equal reward, and nothing is learned from these",
        "give a reward that tells the answers apart, raise model.sampling.temperature, or stop here",
    ),
    _Sign("kl", "kl", "the policy is far from the reference", "raise model.loss.beta, or lower model.optim.lr"),
    _Sign("unscorable", "unscorable", "many answers have no reward", "look at the warnings about rewards"),
)


class OnlineMonitor(Callback):
    """Warns once, or stops training, for each sign that answers degenerate while the reward may still rise.

    A sign counts after three logged values in a row beyond its limit. Each limit may be null.

    Args:
        longest: Most mean length of the answers, as a multiple of that in the first batches.
        truncated: Most share of truncated answers.
        entropy: Least entropy of a token, as a share of that in the first batches.
        without_spread: Most share of prompts whose answers all have the same reward.
        kl: Most mean divergence of an answer from the reference, in nats.
        unscorable: Most share of answers without a reward.
        action: `warn`, or `stop` after the batch.
    """

    def __init__(
        self,
        longest: float | None = 3.0,
        truncated: float | None = 0.3,
        entropy: float | None = 0.05,
        without_spread: float | None = 0.95,
        kl: float | None = None,
        unscorable: float | None = 0.2,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if action not in ("warn", "stop"):
            raise ConfigurationError(f"monitor.action is {action!r}; it must be 'warn' or 'stop'.")
        self.limits = {
            "longest": longest,
            "truncated": truncated,
            "entropy": entropy,
            "without_spread": without_spread,
            "kl": kl,
            "unscorable": unscorable,
        }
        self.action = action
        self._before: dict[str, list[float]] = {}
        self._beyond: dict[str, int] = {}
        self._told: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"before": self._before, "beyond": self._beyond, "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._before, self._beyond = dict(state_dict["before"]), dict(state_dict["beyond"])
        self._told = list(state_dict["told"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the values that are logged in this batch with their limits."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return
        for sign in _SIGNS:
            value, limit = trainer.callback_metrics.get(f"train/{sign.value}"), self.limits[sign.setting]
            if value is None or limit is None or sign.setting in self._told:
                continue
            self._compare(trainer, sign, float(value), limit)

    def _compare(self, trainer: Trainer, sign: _Sign, value: float, limit: float) -> None:
        first = self._before.setdefault(sign.value, [])
        if len(first) < _PATIENCE:
            first.append(value)
        allowed = limit * sum(first) / len(first) if sign.relative else limit
        is_beyond = value > allowed if sign.above else value < allowed
        self._beyond[sign.setting] = self._beyond.get(sign.setting, 0) + 1 if is_beyond else 0
        if self._beyond[sign.setting] < _PATIENCE:
            return
        self._told.append(sign.setting)
        side = "above" if sign.above else "below"
        rank_zero_warn(
            f"At step {trainer.global_step} {sign.finding}: train/{sign.value} is {value:.3g}, in {_PATIENCE} readings "
            f"in a row {side} the {allowed:.3g} that monitor.{sign.setting} allows. Try: {sign.advice}."
            + (" Training stops here (monitor.action)." if self.action == "stop" else "")
        )
        trainer.should_stop = trainer.should_stop or self.action == "stop"


class AnswerTable(Callback):
    """Writes some held-out answers of each validation to `answers.jsonl`: step, user, prompt, answer and reward.

    Args:
        answers: Number of answers of a validation, of different users where there are as many.
    """

    def __init__(self, answers: int = 20) -> None:
        if answers < 0:
            raise ConfigurationError(f"answers.answers is {answers}; it must be 0 or more.")
        self.answers = answers

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the answers of this validation."""
        if not isinstance(pl_module, OnlineRL) or trainer.sanity_checking or trainer.fast_dev_run or not self.answers:  # type: ignore[attr-defined]
            return
        rows = [{"step": trainer.global_step, **row} for row in pl_module.held_out_answers(self.answers)]
        if rows:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            append_whole(run_folder(trainer) / "answers.jsonl", lines.encode())
