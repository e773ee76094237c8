"""`fit`, `validate`, `test` and `predict` of online RL: their configuration has `model.rewards`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.cli.fit import PRLHFCLI, read_whole_numbers_first
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.callbacks.online import AnswerTable, OnlineMonitor
from prlhf_lightning.training.callbacks.outputs import (
    BestAndLast,
    kept_by,
)
from prlhf_lightning.training.online_data import OnlineDataModule
from prlhf_lightning.training.online_module import OnlineRL


class OnlineCLI(PRLHFCLI):
    """LightningCLI for an `OnlineRL` and an `OnlineDataModule`, with shared settings linked."""

    model_type = OnlineRL
    data_type = OnlineDataModule
    about_training = AnswerTable

    def _trainer_defaults(self) -> dict[str, Any]:
        defaults = {**super()._trainer_defaults(), "log_every_n_steps": 1}
        del defaults["gradient_clip_val"]  # see before_fit
        return defaults

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of fixed callbacks, and link settings that data and model share."""
        read_whole_numbers_first(parser)
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(OnlineMonitor, "monitor")
        parser.set_defaults({"checkpoint.monitor": "val/seen/reward", "checkpoint.mode": "max"})
        parser.link_arguments("model.policy", "data.tokenizer", lambda policy: policy.tokenizer, "instantiate")
        parser.link_arguments("model.user_model", "data.history_size", lambda users: users.history_size, "instantiate")
        self._add_init_from(parser)

    def before_fit(self) -> None:
        """Start from an earlier training if `init_from` is given and there is no checkpoint to resume."""
        if self.trainer.gradient_clip_val:
            raise ConfigurationError(
                "trainer.gradient_clip_val has no effect in online RL: leave it out, and set model.max_grad_norm."
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ConfigurationError(
                "trainer.accumulate_grad_batches has no effect in online RL, where a step is on all answers of a "
                "batch: leave it out, and set data.batch_size; model.micro_batch_size limits memory."
            )
        if self.config.fit.init_from and not self.config.fit.ckpt_path:
            self.model.start_from(self.config.fit.init_from)

    def after_fit(self) -> None:
        """Print the metrics and the checkpoints."""
        self._print_evaluation("val")
        if checkpoints := kept_by(self.trainer):
            rank_zero_info(f"Checkpoints: {', '.join(checkpoints)}")
