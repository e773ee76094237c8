"""The LightningModule of online RL: a policy writes for its users, and learns from the rewards of what it wrote.

P prompts in a generation batch, each of one user, with n answers each; B = P n answers of up to L tokens, in the order
of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerState

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import (
    DPOLoss,
    PolicyGradientLoss,
    StepSizes,
    UserScale,
    batch_scaled_advantages,
    centered_advantages,
    group_scaled_advantages,
    leave_one_out_advantages,
    worst_served_weights,
)
from prlhf_lightning.online.rewards import Judged, Reward, RewardSum, Scores
from prlhf_lightning.online.sampling import Answers, Sampler
from prlhf_lightning.policies import CausalLMPolicy, Sampling
from prlhf_lightning.training.checkpoint_entry import KEY
from prlhf_lightning.training.micro_batch import Share, describe_row
from prlhf_lightning.training.module import PersonalizedLM
from prlhf_lightning.training.online_data import OnlineDataModule
from prlhf_lightning.training.online_evaluation import RewardEvaluation, UserReward
from prlhf_lightning.training.optim import Optim, optimizer_steps
from prlhf_lightning.training.sharding import is_sharded
from prlhf_lightning.types import PreferenceBatch, SoftPrompt, Tokens, select_pairs
from prlhf_lightning.user_models import UserModel

AdvantageKind: TypeAlias = Literal["centered", "group", "batch", "leave_one_out"]

_ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "centered": centered_advantages,
    "group": group_scaled_advantages,
    "batch": batch_scaled_advantages,
    "leave_one_out": leave_one_out_advantages,
}
#: Settings of training, which a checkpoint leaves out: other commands open it as a `PersonalizedLM`.
_OF_TRAINING = (
    "rewards",
    "advantages",
    "answers_per_prompt",
    "updates",
    "micro_batch_size",
    "mask_truncated",
    "max_grad_norm",
    "sampling_batch_size",
    "worst_served",
)
_WARNINGS = 10  # about answers without a score


@dataclass(frozen=True)
class Rollouts:
    """A generation batch, ready for updates.

    Attributes:
        answers: B answers.
        generic: `[P]` bool, true where the generic user wrote in the place of the prompt's user.
        mask: `[B, L]` bool, true on the tokens that are trained.
        advantages: `[B]`.
        reference: `[B, L]` log-probs under the reference, or None.
        denominator: Denominator of the loss of an update.
    """

    answers: Answers
    generic: Tensor
    mask: Tensor
    advantages: Tensor
    reference: Tensor | None
    denominator: float


class OnlineRL(PersonalizedLM):
    """A policy that is improved for each of its users against a personalized reward, on its own answers.

    A batch is a generation batch: for each of its prompts, the policy writes several answers under the soft prompt of
    the prompt's user. Each answer gets a reward, and an advantage over the other answers for the same user and prompt.
    Then the policy and the user model take `updates` optimizer steps on all answers.

    The log-probs of the loss are those of the policy under the user's soft prompt, at the sampling temperature. In the
    first update the importance ratio is exactly 1. The reference is the policy with its adapters off, which never sees
    the user's id.

    A checkpoint is that of a `PersonalizedLM` with a `DPOLoss`, whose implicit reward `beta log pi / pi_ref` is what a
    policy with this KL weight has learned. So all other commands and `--init_from` take it.

    Args:
        user_model: Maps users to soft-prompt vectors.
        policy: The language model, conditioned on the vectors.
        loss: The policy-gradient loss.
        rewards: The rewards, which are added up.
        advantages: `UserScale`, the default: the reward minus the mean of its group, divided by a running standard
            deviation of the user's rewards. Or a function of the group: `centered`, `group` (divided by the standard
            deviation of the group, as in GRPO), `batch` or `leave_one_out` (as in RLOO).
        answers_per_prompt: Answers to each prompt, n.
        updates: Optimizer steps on each generation batch; `trainer.max_steps` counts them.
        micro_batch_size: Prompts, each with its answers, in a pass of the policy. It changes nothing but memory and
            time.
        sampling_batch_size: Most answers that are generated at the same time.
        alpha: Share of the prompts for which the user's own soft prompt writes; for the others the generic user writes,
            rewarded as their user would. Below 1 it trains the generic user, and new users start from it.
        worst_served: Above 0, users with a low mean reward so far get larger advantages: a user served worse by 1
            than another gets e to this power times theirs. For rewards that can be compared between users, with
            `UserScale`.
        mask_truncated: Do not train on answers that reached `sampling.max_new_tokens` without an end token.
        max_grad_norm: Gradients are scaled to at most this norm; null for no clipping.
        optim: Learning rates and schedule.
        sampling: Sampling settings of training. Validation is greedy.
    """

    components = ("user_model", "policy", "loss", "rewards", "advantages")

    def __init__(
        self,
        user_model: UserModel,
        policy: CausalLMPolicy,
        loss: PolicyGradientLoss,
        rewards: list[Reward],
        advantages: UserScale | AdvantageKind | None = None,
        answers_per_prompt: int = 8,
        updates: int = 1,
        micro_batch_size: int = 8,
        sampling_batch_size: int = 256,
        alpha: float = 1.0,
        worst_served: float = 0.0,
        mask_truncated: bool = False,
        max_grad_norm: float | None = 1.0,
        optim: Optim = Optim(),  # noqa: B008 - frozen, hence safe to share
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        if not policy.writes:
            raise ConfigurationError(
                f"model.policy is a {type(policy).__name__}, a reward model, which writes no answers. Train a "
                "CausalLMPolicy, and name the reward model's checkpoint in a RewardModelReward of model.rewards."
            )
        super().__init__(user_model, policy, DPOLoss(loss.beta or 0.1), alpha, optim, sampling, cache_reference=False)
        counts = {
            "answers_per_prompt": answers_per_prompt,
            "updates": updates,
            "micro_batch_size": micro_batch_size,
            "sampling_batch_size": sampling_batch_size,
        }
        for name, value in counts.items():
            if value < 1:
                raise ConfigurationError(f"model.{name} is {value}; it must be 1 or more.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigurationError(f"model.max_grad_norm is {max_grad_norm}; it must be above 0, or null.")
        if sampling.temperature == 0 or sampling.top_p < 1:
            raise ConfigurationError(
                f"model.sampling has temperature {sampling.temperature} and top_p {sampling.top_p}; a policy gradient "
                "needs answers from the policy's whole distribution: a temperature above 0, and top_p 1."
            )
        uses_user_mean = isinstance(advantages, UserScale) and advantages.baseline == "user"
        if answers_per_prompt < 2 and not uses_user_mean:
            raise ConfigurationError(
                "model.answers_per_prompt is 1, and an answer's advantage is its reward minus the mean of others: give "
                "2 or more, or advantages of UserScale with baseline: user."
            )
        if worst_served < 0 or (worst_served and isinstance(advantages, str)):
            raise ConfigurationError(
                f"model.worst_served is {worst_served}; it must be 0 or more, and needs users' mean rewards, which "
                "advantages of UserScale keep."
            )
        if isinstance(advantages, str) and advantages not in _ADVANTAGES:
            raise ConfigurationError(f"model.advantages is {advantages!r}; it must be one of {', '.join(_ADVANTAGES)}.")
        self.automatic_optimization = False
        self.policy_gradient = loss
        self.reward_sum = RewardSum(rewards)
        self.advantages = UserScale() if advantages is None else advantages
        self.answers_per_prompt, self.updates = answers_per_prompt, updates
        self.micro_batch_size, self.sampling_batch_size = micro_batch_size, sampling_batch_size
        self.mask_truncated, self.max_grad_norm = mask_truncated, max_grad_norm
        self.worst_served = worst_served
        self._evaluated = RewardEvaluation(())
        self._warned: set[tuple[str, str]] = set()
        self._metrics: dict[str, Share] = {}  # of reward functions

    # ---- set-up

    def setup(self, stage: str) -> None:
        """Set the users from the data, and prepare the rewards for them."""
        super().setup(stage)
        self._evaluated = RewardEvaluation(self.eval_sets)
        if stage != "predict":
            self.reward_sum.prepare(self._datamodule)

    def _check_data(self, datamodule: Any) -> None:
        if not isinstance(datamodule, OnlineDataModule):
            raise ConfigurationError("OnlineRL takes an OnlineDataModule: pass one to the trainer.")

    def on_fit_start(self) -> None:
        """Refuse what is not supported yet."""
        if self.trainer.world_size > 1 or is_sharded(self.policy):
            raise ConfigurationError("Online RL trains in one process: set trainer.devices: 1.")
        super().on_fit_start()

    @cached_property
    def _sampler(self) -> Sampler:
        """The sampler; created once the policy is on its device."""
        return Sampler(cast(CausalLMPolicy, self.policy), self.sampling_batch_size)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that a batch takes."""
        return self.updates

    # ---- steps

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Generate, score, and update."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        rollouts, shares = self._roll_out(batch, batch_idx)
        old = torch.zeros_like(rollouts.answers.log_probs)
        left = self.trainer.max_steps - self.trainer.global_step
        updates = self.updates if self.trainer.max_steps < 0 else min(self.updates, left)
        for update in range(updates):
            optimizer.zero_grad()
            sums = self._backward(batch, rollouts, old, is_first=update == 0)
            self.configure_gradient_clipping(optimizer, self.max_grad_norm, "norm")
            optimizer.step()
            # Between the updates of a batch there is nothing to resume from.
            optimizer.optimizer.is_stepping = update + 1 < updates
            scheduler.step()
        self._log_means({**shares, **sums, **self._metrics}, ("reward", "kl", "length", "entropy"), len(batch))
        self._progress.step_taken(self.trainer.current_epoch, batch_idx, self._running_state(), self._means.sums)

    def _running_state(self) -> dict[str, Tensor]:
        if not isinstance(self.advantages, UserScale):
            return {}
        return {f"advantages.{name}": value for name, value in self.advantages.named_buffers()}

    @torch.no_grad()
    def _roll_out(self, batch: PreferenceBatch, batch_idx: int) -> tuple[Rollouts, dict[str, Share]]:
        """Generate and score the answers of a batch; return them, and the sums of values to log."""
        seeds = np.random.SeedSequence([self._seed or 0, self.trainer.current_epoch, batch_idx])
        generic = torch.rand(len(batch)) >= (self.alpha if self.user_model.personalizes else 1.0)
        answers = self._answers(batch, generic, self.sampling, self.answers_per_prompt, seeds)
        self._metrics = {}
        scores = self._judged(batch, answers.tokens, "train").scores
        mask = answers.tokens.mask & ~(answers.truncated & self.mask_truncated)[:, None]
        reference = None
        if self.policy_gradient.requires_reference:
            reference = torch.zeros_like(answers.log_probs)
            for rows in self._micro_batches(torch.arange(len(batch))):
                self._put(reference, rows, self._reference(batch, answers.tokens, rows))
        rewards = self.policy_gradient.shaped_rewards(
            scores.total.to(self.device), answers.log_probs, reference, answers.tokens.mask
        )
        groups = torch.arange(len(batch), device=self.device).repeat_interleave(self.answers_per_prompt)
        rows = self._known_users().rows(batch.user_ids).to(self.device)[groups]
        advantages = self._advantages(rewards, groups, rows)
        sizes = StepSizes.of(mask.sum(1)[mask.any(1)], self.sampling.max_new_tokens)
        rollouts = Rollouts(answers, generic, mask, advantages, reference, self.policy_gradient.denominator(sizes))
        return rollouts, _shares(rollouts, scores, self.answers_per_prompt)

    def _advantages(self, rewards: Tensor, groups: Tensor, rows: Tensor) -> Tensor:
        """Return the advantages `[B]` of answers with their rewards, groups and users' rows `[B]`."""
        if not isinstance(self.advantages, UserScale):
            return _ADVANTAGES[self.advantages](rewards, groups)
        advantages: Tensor = self.advantages(rewards, groups, rows)
        if not self.worst_served:
            return advantages
        every = torch.arange(1, len(self._known_users()), device=rows.device)
        weights = worst_served_weights(self.advantages.mean(every), self.worst_served)
        return advantages * pad(weights, (1, 0), value=1.0)[rows]

    def _answers(
        self, batch: PreferenceBatch, generic: Tensor, sampling: Sampling, copies: int, seeds: np.random.SeedSequence
    ) -> Answers:
        """Generate answers, each with a seed of its own: they do not depend on how a run came here."""
        drawn = seeds.generate_state(len(batch) * copies, np.uint64) >> np.uint64(1)
        soft_prompt = self._soft_prompt(batch, generic)
        return self._sampler.sample(batch.prompt, soft_prompt, sampling, drawn.reshape(len(batch), copies).tolist())

    def _soft_prompt(self, batch: PreferenceBatch, generic: Tensor) -> SoftPrompt:
        """Return the soft prompts of a batch's users, or of the generic user where `generic` `[P]` is true."""
        return self._prompts_under(self.users_of(batch), generic)

    def _judged(
        self, batch: PreferenceBatch, tokens: Tokens, stage: Literal["train", "validate", "test"], number: int = 0
    ) -> Judged:
        """Return the scores of a batch's answers, which stand next to one another for each prompt."""
        copies = len(tokens) // len(batch)
        every = torch.arange(len(batch), device=self.device).repeat_interleave(copies)
        texts: list[Any] = self.texts_of(tokens, batch.prompt.select(every))
        columns = self._datamodule.columns(batch.records.tolist(), self.reward_sum.columns, stage, number)
        # Copies, since a reward function may change a conversation, and the rows are kept for the next batches.
        repeated = {name: [deepcopy(one) for one in values for _ in range(copies)] for name, values in columns.items()}
        prompts = repeated["prompts"]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        user_ids = [user_id for user_id in batch.user_ids for _ in range(copies)]
        ids = [row.tolist() for row in tokens.unpadded()]
        given: dict[str, list[Any]] = {"completions": completions, "completion_ids": ids, "user_id": user_ids}
        scores = self.reward_sum({**repeated, **given}, copies, self._common())
        self._report(scores, batch, copies)
        return Judged(scores, prompts, texts)

    def _common(self) -> dict[str, Any]:
        """Return what reward functions written for TRL may ask for."""
        steps = optimizer_steps(self.trainer, self.updates) if self.trainer.training else self.trainer.max_steps
        state = TrainerState(global_step=self.trainer.global_step, max_steps=steps)
        return {"trainer_state": state, "log_metric": self._log_metric}

    def _log_metric(self, name: str, value: float) -> None:
        if self.trainer.training:
            self._metrics[name] = (torch.tensor(float(value), device=self.device), torch.ones((), device=self.device))

    def _report(self, scores: Scores, batch: PreferenceBatch, copies: int) -> None:
        for failure in scores.failures:
            kind = (failure.reward, failure.reason)
            if kind in self._warned or len(self._warned) >= _WARNINGS:
                continue
            self._warned.add(kind)
            row = failure.answer // copies
            place = describe_row(self.trainer, int(batch.records[row]))
            more = "" if len(self._warned) < _WARNINGS else " There are no more warnings; see train/unscorable."
            rank_zero_warn(
                f"{place} (user {batch.user_ids[row]!r}): {failure.reward} has no score for an answer "
                f"({failure.reason}). The answer is not trained on.{more}"
            )

    def _micro_batches(self, rows: Tensor) -> Sequence[Tensor]:
        """Split prompts `[m]` into micro-batches."""
        return torch.split(rows.to(self.device), self.micro_batch_size) if len(rows) else []

    def _backward(self, batch: PreferenceBatch, rollouts: Rollouts, old: Tensor, is_first: bool) -> dict[str, Share]:
        """Add up the gradients of an update.

        Args:
            batch: The generation batch.
            rollouts: Its answers.
            old: `[B, L]` log-probs under the policy that wrote the answers. The first update fills them in.
            is_first: Whether the policy has not changed since it wrote the answers.

        Returns:
            The sums of values to log.
        """
        clipped = torch.zeros((), device=self.device)
        for rows in self._micro_batches(self._trained_rows(rollouts)):
            log_probs = self._log_probs(batch, rollouts, rows)
            places, width = self._places(rows), log_probs.shape[1]
            if is_first:
                self._put(old, rows, log_probs.detach())
            output = self.policy_gradient(
                log_probs,
                old[places, :width],
                rollouts.mask[places, :width],
                rollouts.advantages[places],
                rollouts.denominator,
                None if rollouts.reference is None else rollouts.reference[places, :width],
            )
            clipped += output.clipped.sum()
            self.manual_backward(output.loss + self._other_losses(batch, rows))
        return {"clipped": (clipped, rollouts.mask.sum())}

    def _trained_rows(self, rollouts: Rollouts) -> Tensor:
        """Return the prompts `[m]` that have a gradient: with a reference all of them."""
        if rollouts.reference is not None and self.policy_gradient.kl_weight:
            return torch.arange(len(rollouts.generic))
        has_gradient = (rollouts.advantages != 0) & rollouts.mask.any(1)
        return has_gradient.view(-1, self.answers_per_prompt).any(1).nonzero()[:, 0]

    def _other_losses(self, batch: PreferenceBatch, rows: Tensor) -> Tensor:
        """Return the penalty of users and the policy's own loss term for a micro-batch, as shares of the batch."""
        share = len(rows) / len(batch)
        found = torch.zeros((), device=self.device)
        if (penalty := self.penalty(select_pairs(batch, rows))) is not None:
            found = found + share * penalty.mean()
        if (auxiliary := self.policy.auxiliary_loss()) is not None:
            found = found + share * auxiliary
        return found

    def _log_probs(self, batch: PreferenceBatch, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Return the differentiable log-probs `[m n, L']` of the answers to the prompts `rows` `[m]`."""
        part = select_pairs(batch, rows)
        soft_prompt = self._soft_prompt(part, rollouts.generic[rows.cpu()])
        completions = self._answers_to(rollouts.answers.tokens, rows)
        scores = self.policy.log_probs(part.prompt.trimmed(), completions, soft_prompt, self.sampling.temperature)
        return torch.stack([score.tokens for score in scores], 1).flatten(0, 1)

    def _reference(self, batch: PreferenceBatch, tokens: Tokens, rows: Tensor) -> Tensor:
        """Return the log-probs `[m n, L']` under the reference, which sees the users' texts and not their ids."""
        part = select_pairs(batch, rows)
        visible = self.user_model.reference(self.users(part.user_ids, part.user_text, reference=True))
        completions = self._answers_to(tokens, rows)
        scores = self.policy.reference_log_probs(part.prompt.trimmed(), completions, visible, self.sampling.temperature)
        return torch.stack([score.tokens for score in scores], 1).flatten(0, 1)

    def _answers_to(self, tokens: Tokens, rows: Tensor) -> list[Tokens]:
        """Return the answers to the prompts `rows` `[m]` as n batches of m, as long as the longest of them."""
        some = tokens.select(self._places(rows)).trimmed()
        number = torch.arange(len(some), device=self.device) % self.answers_per_prompt
        return [some.select(number == n) for n in range(self.answers_per_prompt)]

    def _places(self, rows: Tensor) -> Tensor:
        """Return the places `[m n]` of the answers to the prompts `rows` `[m]`."""
        copies = torch.arange(self.answers_per_prompt, device=rows.device)
        return (rows[:, None] * self.answers_per_prompt + copies).flatten()

    def _put(self, table: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write the values `[m n, L']` of the prompts `rows` `[m]` into a table `[B, L]`."""
        table[self._places(rows), : values.shape[1]] = values

    # ---- evaluation

    def _evaluation_step(self, batch: PreferenceBatch, dataloader_idx: int) -> None:
        """Generate greedily for a batch's users, and for the generic user in their place."""
        name = self.eval_sets[dataloader_idx]
        greedy = Sampling(self.sampling.max_new_tokens, temperature=0.0)
        stage: Literal["validate", "test"] = "test" if self.trainer.testing else "validate"
        kinds = (False, True) if self.user_model.personalizes and name != "unseen" else (False,)
        for generic in kinds:
            who = torch.full((len(batch),), generic)
            answers = self._answers(batch, who, greedy, 1, np.random.SeedSequence(0))
            judged = self._judged(batch, answers.tokens, stage, dataloader_idx)
            self._evaluated.update(name, batch.user_ids, judged, generic)

    def on_validation_epoch_start(self) -> None:
        """Reset the rewards of the last validation."""
        self._evaluated.reset()

    def on_test_epoch_start(self) -> None:
        """Reset the rewards of the last test."""
        self._evaluated.reset()

    def _log_metrics(self, stage: str) -> None:
        for name in self.eval_sets:
            for key, value in self._evaluated.values(name).items():
                self.log(f"{stage}/{name}/{key}", value, prog_bar=name == "seen" and key == "reward")

    def user_table(self, name: str, generic: bool = False) -> list[tuple[str, UserReward]]:  # type: ignore[override]
        """Return each user's id and mean reward in the last evaluation of a set, `seen` or `unseen`."""
        return self._evaluated.user_table(name, generic)

    def held_out_answers(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` answers of the last evaluation, with `user_id`, `prompt`, `answer` and `reward`."""
        return self._evaluated.answers(count)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a `PersonalizedLM` stores, and the running statistics of users' rewards."""
        super().on_save_checkpoint(checkpoint)
        state = self._progress.state or self._running_state()
        rows = len(self._known_users())  # a user without any answer yet has none of the last rows
        checkpoint[KEY]["advantages"] = {name: pad(value, (0, rows - len(value))) for name, value in state.items()}
        settings = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if isinstance(settings, Mapping):
            kept = {name: value for name, value in settings.items() if name not in _OF_TRAINING}
            if "loss" in kept:
                kept["loss"] = {
                    "class_path": "prlhf_lightning.losses.DPOLoss",
                    "init_args": {"beta": self.loss.beta},
                }
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = kept

    def _go_on(self, checkpoint: dict[str, Any], kept: Mapping[str, Any]) -> None:
        super()._go_on(checkpoint, kept)
        state = kept.get("advantages") or {}
        if isinstance(self.advantages, UserScale) and state:
            self.advantages.load_state_dict({name.partition(".")[2]: value for name, value in state.items()})


def _shares(rollouts: Rollouts, scores: Scores, copies: int) -> dict[str, Share]:
    """Return the sums of what is logged about a generation batch, each with its count."""
    answers, device = rollouts.answers, rollouts.advantages.device
    tokens, count = answers.tokens.mask.sum(), torch.tensor(len(answers.tokens), device=device)

    def given(values: Tensor) -> Share:
        return torch.nan_to_num(values).sum().to(device), (~values.isnan()).sum().to(device)

    shares = {
        "reward": given(scores.total),
        "length": (tokens, count),
        "entropy": (-answers.log_probs.sum(), tokens),  # in nats per token, estimated from the sampled ones
        "truncated": (answers.truncated.sum(), count),
        "unscorable": (scores.total.isnan().sum().to(device), count),
        "without_spread": (
            (rollouts.advantages == 0).view(-1, copies).all(1).sum(),
            torch.tensor(len(rollouts.generic), device=device),
        ),
    }
    if len(scores.parts) > 1:
        shares |= {f"reward/{name}": given(values) for name, values in scores.parts.items()}
    if rollouts.reference is not None:
        gap = torch.where(answers.tokens.mask, answers.log_probs - rollouts.reference, 0.0)
        shares["kl"] = (gap.sum(), count)  # in nats per answer
    return shares
