"""`python -m prlhf_lightning fit|validate|test|predict --config ...`."""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import Any, NoReturn

from jsonargparse import dict_to_namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.callbacks import BestAndLast, PredictionWriter, SaveOnInterrupt, UserTable, run_folder
from prlhf_lightning.data import DataSource, PreferenceDataModule
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.losses import PreferenceLoss
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.policies import Policy
from prlhf_lightning.tasks.compare import Contender, compare
from prlhf_lightning.user_models import UserModel


class _Parser(LightningArgumentParser):
    """Says what is wrong and what may have been meant, without a hundred lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = {name for component in (UserModel, Policy, PreferenceLoss, DataSource) for name in _names(component)}
        known |= {action.dest for action in (getattr(ex, "subcommand_parser", None) or self)._actions}
        known |= {dest.rpartition(".")[2] for dest in known}
        meant = [
            f"{word!r}: did you mean {' or '.join(map(repr, close))}?"
            for word in re.findall(r"(?:string: |option '|Option '|attribute '|arguments: --)([\w.]+)", message)
            if (close := difflib.get_close_matches(word, known - {word}, n=2, cutoff=0.75))
        ]
        hints = [*meant, f"All options: {self.prog.replace(' [options]', '')} --help"]
        sys.stderr.write("error: " + "\n".join([message, *hints]) + "\n")
        self.exit(2)


def _names(component: type) -> Iterator[str]:
    subclasses: list[type] = component.__subclasses__()
    for subclass in subclasses:
        yield subclass.__name__
        yield from signature(subclass).parameters
        yield from _names(subclass)


class PRLHFCLI(LightningCLI):
    """LightningCLI for a `PersonalizedLM` and a `PreferenceDataModule`, with what they share linked.

    Args:
        args: Command line, or the configuration itself; `sys.argv` by default.
    """

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
            parser_class=_Parser,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint settings, and link what data and model share."""
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.link_arguments("model.policy", "data.tokenizer", lambda policy: policy.tokenizer, "instantiate")
        parser.link_arguments("model.loss", "data.require_rejected", lambda loss: loss.requires_rejected, "instantiate")
        parser.add_argument(
            "--baseline",
            type=bool,
            default=False,
            help="After fit, train the same policy on the same data and steps without a user model (for a DPO loss: "
            "vanilla DPO), and print the two side by side.",
        )

    def after_fit(self) -> None:
        """Compare with the vanilla counterpart, if asked to."""
        if not self.config.fit.baseline or self.trainer.interrupted:
            return
        config = self.config.fit.clone()
        config.model.user_model = dict_to_namespace(
            {"class_path": "prlhf_lightning.user_models.UniformUserModel", "init_args": {"num_tokens": 0}}
        )
        seed_everything(config.seed_everything)
        fresh = self._parser("fit").instantiate_classes(config)
        folder = run_folder(self.trainer)
        trainer = Trainer(
            **{
                **fresh.trainer.as_dict(),
                "logger": CSVLogger(folder, name="baseline", version=""),
                "callbacks": [] if fresh.trainer.enable_progress_bar is False else [RichProgressBar()],
                "enable_checkpointing": False,
            }
        )
        rank_zero_info("Training the same without a user model, to compare.")
        trainer.fit(fresh.model, fresh.data)
        if self.trainer.is_global_zero:
            contenders = {
                "vanilla": Contender(fresh.model, trainer.callback_metrics),
                "personalised": Contender(self.model, self.trainer.callback_metrics),
            }
            compare(contenders, self.datamodule, folder)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        config["callbacks"] = list(config["callbacks"] or [])
        wanted = config["enable_progress_bar"] is not False
        if wanted and not any(isinstance(callback, ProgressBar) for callback in config["callbacks"]):
            config["callbacks"].append(RichProgressBar())
        if config["logger"] is None:
            config["logger"] = CSVLogger(config["default_root_dir"] or "runs", name="")
        return super()._instantiate_trainer(config, callbacks)


def main(args: ArgsType = None) -> None:
    """Run the command line; an error that a person can mend is printed without a stack trace."""
    # Lightning advertises an add-on at each start, in the voice of a warning.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of torch's pytree
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        PRLHFCLI(args)
    except PRLHFError as error:
        sys.exit(f"error: {error}")
