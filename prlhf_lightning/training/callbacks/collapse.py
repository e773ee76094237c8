"""Detection of collapse: degenerate answers although accuracy may still rise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.metrics import repeated_ngrams
from prlhf_lightning.policies import Sampling
from prlhf_lightning.training import PersonalizedLM
from prlhf_lightning.training.distributed import holds_whole_model
from prlhf_lightning.types import PreferenceBatch, Tokens

_PATIENCE = 3  # consecutive readings, since one batch may be an exception


@dataclass(frozen=True)
class _Sign:
    """A sign of collapse in generated answers.

    Attributes:
        limit: Name of the setting.
        name: Name of the measured value.
        finding: Meaning of a value beyond the limit.
        above: Whether large values are bad, not small ones.
        relative_to: Name of the value to which the limit is added.
    """

    limit: str
    name: str
    finding: str
    above: bool = True
    relative_to: str = ""

    def is_worse(self, value: float, than: float) -> bool:
        return value > than if self.above else value < than


_SIGNS = (
    _Sign("generated_log_ratio", "generated_log_ratio", "the model is far from the reference"),
    _Sign("shortest", "generated_length_ratio", "its answers are short relative to the chosen ones", above=False),
    _Sign("longest", "generated_length_ratio", "its answers are long relative to the chosen ones"),
    _Sign("repetition", "generated_repetition", "its answers repeat themselves", relative_to="chosen_repetition"),
    _Sign("empty", "generated_empty", "its answers are empty"),
)


class CollapseMonitor(Callback):
    """Warns once for each sign of collapse, with the evidence and settings to change; logs `val/generated_...`.

    In training, whenever values are logged, it checks the log-probs of chosen completions. In validation the model
    generates a few greedy answers, which do not affect the training result. A warning needs a value that is beyond its
    limit and worse than before training. Each limit may be null, for no warning. Sharded models are not measured in
    validation, and reward models write no answers.

    Args:
        prompts: Number of validation prompts to answer in each validation; 0 for none.
        max_new_tokens: Maximum tokens of an answer, also limited to three times the longest chosen completion.
        chosen_log_ratio: Minimum mean log-probability of a chosen completion's token, relative to the reference.
        generated_log_ratio: Maximum of the same for tokens of the answers: an estimate of the Kullback-Leibler
                    divergence from the reference.
        shortest: Minimum mean length of the answers, relative to the chosen completions.
        longest: Maximum mean length of the answers, relative to the chosen completions.
        repetition: Maximum excess of the share of repeated 4-grams in the answers over that in chosen completions.
        empty: Maximum share of answers without any text.
    """

    def __init__(
        self,
        prompts: int = 8,
        max_new_tokens: int = 128,
        chosen_log_ratio: float | None = -1.0,
        generated_log_ratio: float | None = 2.0,
        shortest: float | None = 0.3,
        longest: float | None = 2.0,
        repetition: float | None = 0.3,
        empty: float | None = 0.1,
    ) -> None:
        for name, least, value in (("prompts", 0, prompts), ("max_new_tokens", 1, max_new_tokens)):
            if value < least:
                raise ConfigurationError(f"collapse.{name} is {value}; it must be {least} or more.")
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.limits: dict[str, float | None] = {
            "chosen_log_ratio": chosen_log_ratio,
            "generated_log_ratio": generated_log_ratio,
            "shortest": shortest,
            "longest": longest,
            "repetition": repetition,
            "empty": empty,
        }
        self._before: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._warned: list[str] = []
        self._low_readings, self._read_at = 0, 0
        self._failed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"before": dict(self._before), "warned": list(self._warned), "low_readings": self._low_readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values before training, and the warnings that were given."""
        self._before, self._warned = dict(state_dict["before"]), list(state_dict["warned"])
        self._low_readings = state_dict.get("low_readings", 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the chosen completions when the logger reads the same value from the device."""
        limit, every = self.limits["chosen_log_ratio"], trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if limit is None or not every or step % every or step == self._read_at:
            return
        self._read_at = step
        value = trainer.callback_metrics.get("train/chosen_log_ratio")
        if value is None:
            return
        reading = float(value)
        self._low_readings = self._low_readings + 1 if reading < limit else 0
        if self._low_readings == _PATIENCE:
            self._warn(
                trainer,
                pl_module,
                "chosen_log_ratio",
                f"the chosen completions are much less likely than before training: train/chosen_log_ratio is "
                f"{reading:.2f} a token, in {_PATIENCE} readings in a row below the {limit:.2f} that "
                "collapse.chosen_log_ratio allows",
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, measure and log."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._now = {}
        alone = trainer.world_size == 1
        known = isinstance(pl_module, PersonalizedLM) and pl_module.policy.writes and hasattr(datamodule, "sample")
        if not (self.prompts and known and holds_whole_model(trainer)):
            return
        # One process generates, and all log: the others wait for it here.
        values = self._measure(trainer, pl_module, datamodule) if trainer.is_global_zero else {}
        self._now = values if alone else trainer.strategy.broadcast(values)
        for name, value in self._now.items():
            pl_module.log(f"val/{name}", value, sync_dist=not alone)
        if trainer.sanity_checking and trainer.global_step == 0:
            self._before = dict(self._now)

    def _measure(self, trainer: Trainer, module: Any, datamodule: Any) -> dict[str, float]:
        batch = datamodule.sample(self.prompts)
        if not len(batch) or self._failed:
            return {}
        if trainer.sanity_checking:  # it takes minutes for a large model on a CPU
            rank_zero_info(
                f"Generating {len(batch)} answers, now and in each validation, to detect collapse (collapse.prompts)."
            )
        try:
            with isolate_rng(), trainer.precision_plugin.val_step_context():
                return measure(module, batch.to(module.device), self.max_new_tokens)
        except Exception as error:  # the monitor must not stop training
            self._failed = True
            rank_zero_warn(f"Collapse detection generates no more answers, since that failed: {error!r}")
            return {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the limits."""
        if trainer.sanity_checking:
            return
        for sign in _SIGNS:
            now, limit = self._now.get(sign.name), self.limits[sign.limit]
            if now is None or limit is None:
                continue
            allowed = limit + self._now.get(sign.relative_to, 0.0)
            before = self._before.get(sign.name)
            if sign.is_worse(now, allowed) and (before is None or sign.is_worse(now, before)):
                side = "above" if sign.above else "below"
                evidence = f"{sign.finding}: val/{sign.name} is {now:.2f}, {side} the {allowed:.2f} that"
                if before is not None:
                    evidence = evidence.replace(",", f" (before training {before:.2f}),")
                self._warn(trainer, pl_module, sign.limit, f"{evidence} collapse.{sign.limit} allows")

    def _warn(self, trainer: Trainer, module: LightningModule, limit: str, evidence: str) -> None:
        if limit in self._warned:
            return
        self._warned.append(limit)
        loss = getattr(module, "loss", None)
        accuracy = trainer.callback_metrics.get("val/seen/accuracy")
        rank_zero_warn(
            f"At step {trainer.global_step} {evidence}"
            + (f"; val/seen/accuracy is {float(accuracy):.2f}" if accuracy is not None else "")
            + ". Its answers may be useless at any accuracy. Inspect them with `predict`, and try: "
            f"model.loss.sft_weight (now {getattr(loss, 'sft_weight', 0):g}) of 0.3 or more; a higher model.loss.beta "
            f"(now {getattr(loss, 'beta', 0):g}); a lower model.optim.lr; fewer epochs."
        )


_ROOM = 3  # maximum length of an answer, as a multiple of the longest chosen one


@torch.no_grad()
def measure(module: PersonalizedLM, batch: PreferenceBatch, most: int) -> dict[str, float]:
    """Generate a greedy answer to each prompt of a batch and return statistics of the answers.

    Args:
        module: A model in evaluation mode.
        batch: B pairs.
        most: Maximum number of tokens of an answer.

    Returns:
        Empty if no token can be generated. Otherwise `generated_length_ratio` to the chosen completions, both cut at
        the same number of tokens, `generated_repetition`, `chosen_repetition` and `generated_empty`. With a reference,
        also the mean log-ratio per token: `generated_log_ratio` of the answers (an estimate of the divergence from the
        reference) and `chosen_log_ratio` of the chosen completions.
    """
    soft_prompt = module.user_model(module.users(batch.user_ids, batch.user_text))
    most = min(most, _ROOM * batch.chosen.ids.shape[1])
    if module.policy.max_positions is not None:
        most = min(most, module.policy.max_positions - soft_prompt.vectors.shape[1] - batch.prompt.ids.shape[1])
    if most < 1:
        return {}
    written = module.policy.generate(batch.prompt, soft_prompt, Sampling(max_new_tokens=most, temperature=0.0))
    special = set(module.policy.tokenizer.all_special_ids)
    answers, chosen = _rows(written), _rows(batch.chosen)
    values = {
        "generated_length_ratio": _mean_length(answers, most) / _mean_length(chosen, most),
        "generated_repetition": _mean([repeated_ngrams(answer) for answer in answers]),
        "chosen_repetition": _mean([repeated_ngrams(answer) for answer in chosen]),
        "generated_empty": _mean([float(special.issuperset(answer)) for answer in answers]),
    }
    if module.loss.requires_reference:
        visible = module.user_model.reference(module.users(batch.user_ids, batch.user_text, reference=True))
        texts = [written, batch.chosen]
        now = module.policy.log_probs(batch.prompt, texts, soft_prompt)
        before = module.policy.reference_log_probs(batch.prompt, texts, visible)
        ratios: list[Tensor] = [(a.mean - b.mean).mean() for a, b in zip(now, before, strict=True)]
        values |= {"generated_log_ratio": ratios[0].item(), "chosen_log_ratio": ratios[1].item()}
    return values


def _rows(tokens: Tokens) -> list[list[int]]:
    return [ids.tolist() for ids in tokens.unpadded()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_length(rows: Sequence[Sequence[int]], most: int) -> float:
    return _mean([min(len(row), most) for row in rows])
