"""Checks that reject trainer settings which would fail in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import MarginLoss, PreferenceLoss
from prlhf_lightning.policies import Policy
from prlhf_lightning.training.distributed import gather_objects
from prlhf_lightning.training.histories import check_histories
from prlhf_lightning.training.optim import training_batches
from prlhf_lightning.types import Feedback, Users
from prlhf_lightning.user_models import UserModel

_COLUMNS: dict[Feedback, str] = {
    "pairs": "pairs ('chosen' and 'rejected')",
    "thumbs": "thumbs ('completion' and 'label')",
    "demonstrations": "demonstrations ('chosen')",
}


def check_feedback(loss: PreferenceLoss, given: Feedback) -> None:
    """Refuse data of another kind than the loss needs; demonstrations may be the chosen completions of pairs.

    Raises:
        ConfigurationError: Names both, and the setting.
    """
    if loss.feedback != given and (loss.feedback, given) != ("demonstrations", "pairs"):
        raise ConfigurationError(
            f"{type(loss).__name__} takes {_COLUMNS[loss.feedback]}, but the data module reads {_COLUMNS[given]}: give "
            f"it feedback={loss.feedback!r} and such rows, or choose another loss (KTOLoss for thumbs, DPOLoss for "
            "pairs, SFTLoss for demonstrations)."
        )


def check_takes_rewards(policy: Policy, loss: PreferenceLoss) -> None:
    """Refuse a loss of log-probabilities for a policy that is a reward model.

    Raises:
        ConfigurationError: Names the loss and what of it needs log-probabilities.
    """
    if policy.writes:
        return
    need = None
    if loss.requires_reference:
        need = "compares the policy with a reference"
    elif loss.sft_weight:
        need = f"has an SFT term (sft_weight {loss.sft_weight:g})"
    elif not isinstance(loss, MarginLoss) or type(loss).rewards is not PreferenceLoss.rewards:
        need = "needs the log-probabilities of tokens"
    if need:
        raise ConfigurationError(
            f"model.loss is {type(loss).__name__}, which {need}; model.policy is a {type(policy).__name__}, a reward "
            "model without log-probabilities. Use BradleyTerryLoss, or a CausalLMPolicy."
        )


def check_fit(trainer: Trainer, user_model: UserModel, loss: PreferenceLoss, vocabulary: UserVocabulary) -> None:
    """Refuse settings that would fail during a fit, and warn about useless ones; all processes must call this.

    Raises:
        ConfigurationError: Names the setting.
    """
    datamodule = getattr(trainer, "datamodule", None)
    check_trainer(trainer)
    check_histories(user_model, loss, datamodule)
    check_same_data(trainer, vocabulary)
    check_batch_size(loss, getattr(datamodule, "batch_size", 2))
    if user_model.uses_text and not getattr(datamodule, "has_user_text", True):
        rank_zero_warn(
            f"{type(user_model).__name__} reads texts about users, and no row has one: name their column with "
            "data.source.columns, as in {user_text: profile}, or choose a user model that needs only votes, such as "
            "IndividualUserModel."
        )


def check_batch_size(loss: PreferenceLoss, batch_size: int) -> None:
    """Refuse batches of one row for losses that combine each row's prompt with another row's completion.

    Raises:
        ConfigurationError: Names the loss and the setting.
    """
    if loss.requires_mismatched and batch_size < 2:
        raise ConfigurationError(
            f"{type(loss).__name__} learns its reference point from completions of other rows of a batch, and "
            f"data.batch_size is {batch_size}: set it to 2 or more (and trainer.accumulate_grad_batches to keep rows a "
            "step), or use BCOUnpairedLoss, which needs none."
        )


def check_same_data(trainer: Trainer, vocabulary: UserVocabulary) -> None:
    """Refuse to train if processes found different data, and so would distribute different rows; all must call this.

    Raises:
        ConfigurationError: Names the cause.
    """
    if trainer.world_size == 1:
        return
    rows = getattr(getattr(trainer, "datamodule", None), "num_training_rows", None)
    if len(set(gather_objects(trainer, (rows, vocabulary.digest())))) > 1:
        raise ConfigurationError(
            "The processes found different training data, probably since rows were added while they started: do not "
            "change the data (for a FeedbackLogSource set data.source.until), and start again."
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings with which a fit must fail.

    Raises:
        ConfigurationError: Names the setting.
    """
    clip, epochs = trainer.gradient_clip_val, trainer.check_val_every_n_epoch
    if clip is not None and not clip >= 0:
        raise ConfigurationError(
            f"trainer.gradient_clip_val is {clip}; it must be above 0, or 0 or null for no clipping."
        )
    if epochs is not None and epochs < 1:
        raise ConfigurationError(
            f"trainer.check_val_every_n_epoch is {epochs}; it must be at least 1, or null to count the batches of "
            "val_check_interval over all epochs. For no validation set trainer.limit_val_batches: 0."
        )
    _check_interval(trainer, epochs)


def _check_interval(trainer: Trainer, epochs: int | None) -> None:
    interval = getattr(trainer, "val_check_interval", None)  # missing if validation is scheduled by time
    if interval == 0:
        raise ConfigurationError(
            "trainer.val_check_interval is 0; give a number of batches, or a share of an epoch such as 0.5. For no "
            "validation set trainer.limit_val_batches: 0."
        )
    # A share of an epoch is a float, also 1.0; Lightning has checked that it is not larger.
    if not isinstance(interval, int) or epochs is None or not hasattr(trainer.datamodule, "batches_per_epoch"):  # type: ignore[attr-defined]
        return
    batches = training_batches(trainer)
    if interval > batches:
        raise ConfigurationError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches; set it to {batches} at "
            "most, to a share of an epoch such as 0.5, or set trainer.check_val_every_n_epoch: null, with which the "
            "batches are counted over all epochs."
        )


@torch.no_grad()
def check_row_lengths(trainer: Trainer | None, policy: Policy, user_model: UserModel) -> None:
    """Refuse data with rows that are too long for the policy, before training starts.

    Args:
        trainer: Its data module provides the length of the longest row, if it can; None without a trainer.
        policy: A policy that has been built.
        user_model: A user model that has been built.

    Raises:
        ConfigurationError: Names the lengths, and the settings that determine them.
    """
    limit = policy.max_positions
    data: Any = getattr(trainer, "datamodule", None)
    if trainer is None or limit is None or not hasattr(data, "longest_row") or trainer.predicting:
        return
    if data.has_user_text and not user_model.uses_text:
        return  # it counts texts that this model leaves out
    # Not the module's device: after a fit Lightning leaves the model on the host, and says where it is to go next.
    device = next((param.device for param in user_model.parameters()), None)
    anyone = Users(torch.zeros(1, dtype=torch.long, device=device))
    vectors = user_model.generic(anyone).vectors.shape[1]
    if data.longest_row + vectors > limit:
        subject = "A streamed row may have" if getattr(data, "streaming", False) else "The longest row has"
        raise ConfigurationError(
            f"{subject} {data.longest_row} tokens (user text, prompt and completion), with the user's "
            f"{vectors} vectors {data.longest_row + vectors}; the policy has {limit} positions. Lower "
            "data.max_prompt_length, data.max_completion_length or data.max_user_text_length, or the user model's "
            "num_tokens."
        )
