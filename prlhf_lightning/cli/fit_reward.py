"""`fit`, `validate` and `test` of reward models: their configuration has a `model.backbone`."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.cli.fit import PRLHFCLI, read_whole_numbers_first
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training.callbacks import StopOnSignal
from prlhf_lightning.training.callbacks.outputs import BestAndLast, LogShortRuns, UserTable, kept_by
from prlhf_lightning.training.reward_data import RewardDataModule
from prlhf_lightning.training.reward_module import PersonalizedRewardModel
from prlhf_lightning.training.run_history import RunHistory

#: Options of policies that reward models do not have, and what to do in their place.
_NOT_HERE = {
    "init_from": "a reward model is fitted to all pairs at once, in seconds: give old and new pairs together, or learn "
    "new users with `adapt`.",
    "train_baseline": "each evaluation shows the same pairs under the generic user; for a model without users, train a "
    "UniformUserModel.",
    "shrink_users": "`fit` chooses by held-out judgments how much users may differ (model.precision).",
}


class RewardCLI(PRLHFCLI):
    """LightningCLI for a `PersonalizedRewardModel` and a `RewardDataModule`, with shared settings linked."""

    model_type = PersonalizedRewardModel
    data_type = RewardDataModule
    base = "backbone"

    def _run(self, args: ArgsType) -> None:
        words = sys.argv[1:] if args is None else args
        for word in words if isinstance(words, list) else ():
            name = word.partition("=")[0].removeprefix("--")
            if word.startswith("--") and name in _NOT_HERE:
                raise ConfigurationError(f"{name}: reward models have no such option: {_NOT_HERE[name]}")
        super()._run(args)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; a fit goes on from none."""
        given = self.config[self.config.subcommand]
        if self.config.subcommand == "fit" and given.ckpt_path == "last":  # a command that starts and resumes a run
            rank_zero_info("A fit of a reward model takes seconds and always starts anew: ckpt_path has no effect.")
            given.ckpt_path = None
        elif self.config.subcommand == "fit" and given.ckpt_path:
            raise ConfigurationError(
                "ckpt_path: a fit of a reward model takes seconds and goes on from no checkpoint. Leave it out to fit "
                "all pairs anew, or learn new users with `adapt`."
            )
        super()._parse_ckpt_path()

    def before_predict(self) -> None:
        """Refuse the command."""
        raise ConfigurationError("predict: a reward model writes no text; `score` gives the rewards of texts.")

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
