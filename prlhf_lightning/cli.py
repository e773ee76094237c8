"""`python -m prlhf_lightning fit|validate|test|predict --config ...`."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from prlhf_lightning.callbacks import BestAndLast, PredictionWriter, SaveOnInterrupt, UserTable
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.modules import PersonalizedLM


class PRLHFCLI(LightningCLI):
    """LightningCLI for a `PersonalizedLM` and a `PreferenceDataModule`, with what they share linked."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            PersonalizedLM,
            PreferenceDataModule,
            trainer_defaults={
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 10,
                "use_distributed_sampler": False,  # the data module's sampler divides batches among processes
                "enable_model_summary": False,
                "callbacks": [SaveOnInterrupt(), UserTable(), PredictionWriter()],
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint settings, and link what data and model share."""
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.link_arguments("model.policy", "data.tokenizer", lambda policy: policy.tokenizer, "instantiate")
        parser.link_arguments("model.loss", "data.require_rejected", lambda loss: loss.requires_rejected, "instantiate")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        config["callbacks"] = list(config["callbacks"] or [])
        if not any(isinstance(callback, ProgressBar) for callback in config["callbacks"]):
            config["callbacks"].append(RichProgressBar())
        if config["logger"] is None:
            config["logger"] = CSVLogger(config["default_root_dir"] or "runs", name="")
        return super()._instantiate_trainer(config, callbacks)


def main(args: ArgsType = None) -> None:
    """Run the command line."""
    PRLHFCLI(args)


if __name__ == "__main__":
    main(sys.argv[1:])
