"""`fit`, `validate` and `test` of reward models: their configuration has a `model.backbone`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.cli.fit import PRLHFCLI, read_whole_numbers_first
from prlhf_lightning.training.callbacks import StopOnSignal
from prlhf_lightning.training.callbacks.outputs import BestAndLast, LogShortRuns, UserTable, kept_by
from prlhf_lightning.training.reward_data import RewardDataModule
from prlhf_lightning.training.reward_module import PersonalizedRewardModel
from prlhf_lightning.training.run_history import RunHistory


class RewardCLI(PRLHFCLI):
    """LightningCLI for a `PersonalizedRewardModel` and a `RewardDataModule`, with shared settings linked."""

    model_type = PersonalizedRewardModel
    data_type = RewardDataModule
    base = "backbone"

    def _trainer_defaults(self) -> dict[str, Any]:
        return {
            "max_epochs": 1,  # an epoch is a whole fit
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "callbacks": [StopOnSignal(), RunHistory(), UserTable(), LogShortRuns()],
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of checkpoints, and link the backbone's tokenizer."""
        read_whole_numbers_first(parser)
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.link_arguments("model.backbone", "data.tokenizer", lambda backbone: backbone.tokenizer, "instantiate")

    def before_fit(self) -> None:
        """Do nothing: there is nothing to start from."""

    def after_fit(self) -> None:
        """Print the metrics and the checkpoints."""
        self._print_evaluation("val")
        if checkpoints := kept_by(self.trainer):
            rank_zero_info(f"Checkpoints: {', '.join(checkpoints)}")
