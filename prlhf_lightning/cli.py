"""`python -m prlhf_lightning fit|validate|test|predict --config ...`, and the tasks that follow training."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from inspect import getdoc
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from prlhf_lightning import __version__
from prlhf_lightning.callbacks import (
    BestAndLast,
    LogShortRuns,
    PredictionWriter,
    SaveOnInterrupt,
    UserTable,
    kept_by,
    run_folder,
)
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.files import check_writable
from prlhf_lightning.guards import CollapseMonitor, ExplainOutOfMemory, StopOnSignal, is_out_of_memory
from prlhf_lightning.modules import PersonalizedLM
from prlhf_lightning.modules.sharding import is_sharded
from prlhf_lightning.parser import Parser
from prlhf_lightning.tasks import users
from prlhf_lightning.tasks.adapt import adapt
from prlhf_lightning.tasks.checkpoints import last_checkpoint, read_checkpoint
from prlhf_lightning.tasks.compare import Contender, compare
from prlhf_lightning.tasks.data_check import check
from prlhf_lightning.tasks.data_convert import convert
from prlhf_lightning.tasks.data_describe import describe
from prlhf_lightning.tasks.export import export
from prlhf_lightning.tasks.generate import generate
from prlhf_lightning.tasks.rebase import rebase
from prlhf_lightning.tasks.report import report
from prlhf_lightning.tasks.serve import api_key, serve
from prlhf_lightning.tasks.shrink import shrink

#: What there is to do with a trained model: each function is a command, its arguments are the options.
TASKS: dict[str, Any] = {
    "adapt": adapt,
    "export": export,
    "generate": generate,
    "report": report,
    "serve": serve,
    "shrink": shrink,
    "rebase": rebase,
    "api-key": api_key,
    "users": {
        "_help": "List, show, add, remove or export the users of a checkpoint.",
        "list": users.list_users,
        "show": users.show,
        "add": users.add,
        "remove": users.remove,
        "export": users.export,
    },
    "data": {
        "_help": "Check or describe feedback, or convert it to Parquet.",
        "check": check,
        "convert": convert,
        "describe": describe,
    },
}

_LISTS = {("generate", "--users"), ("serve", "--allowed_hosts")}  # options that take several words
_RUNS = "runs"  # where runs go that were not told a folder


def _summary(task: Any) -> str:
    """Return what a command, or a group of commands, does, in a line."""
    return str(task["_help"]) if isinstance(task, dict) else (getdoc(task) or "").partition("\n")[0]


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
                "callbacks": [
                    SaveOnInterrupt(),
                    StopOnSignal(),
                    ExplainOutOfMemory(),
                    UserTable(),
                    PredictionWriter(),
                    LogShortRuns(),
                ],
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={
                "description": "Train and use language models that write differently for each user.",
                "epilog": "tasks, each of which explains itself with --help:\n"
                + "\n".join(f"  {name}: {_summary(task)}" for name, task in TASKS.items()),
            },
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of what is always there, and link what data and model share."""
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(CollapseMonitor, "collapse")
        parser.link_arguments("model.policy", "data.tokenizer", lambda policy: policy.tokenizer, "instantiate")
        parser.link_arguments("model.loss", "data.feedback", lambda loss: loss.feedback, "instantiate")
        parser.link_arguments("model.user_model", "data.history_size", lambda users: users.history_size, "instantiate")
        parser.add_argument(
            "--baseline",
            type=bool,
            default=False,
            help="After fit, train the same policy on the same data and steps without a user model (for a DPO loss: "
            "vanilla DPO), and print the two side by side.",
        )

    def before_instantiate_classes(self) -> None:
        """Name a model's folder from the root, so that what is done with a checkpoint may be done in any folder."""
        settings = self.config[self.config.subcommand].model.policy.get("init_args") or {}
        model = settings.get("model")
        if model and Path(model).is_dir():
            settings["model"] = str(Path(model).absolute())

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint can be read; its weights are loaded later, and its settings are not taken.

        Lightning would let a checkpoint's hyper-parameters replace, without a word, what the command line and the
        configuration say of the model. They are not needed: the whole model is configured in every command.
        """
        given = self.config[self.config.subcommand]
        if given.ckpt_path == "last":
            given.ckpt_path = self._last_checkpoint(given.trainer.default_root_dir or _RUNS)
        path = str(given.ckpt_path or "")
        # Lightning itself finds these, and what is on other file systems.
        is_found_later = path in ("", "hpc") or path.startswith("registry") or "://" in path
        if not is_found_later:
            content = read_checkpoint(path, "ckpt_path", weights_only=given.weights_only is not False)
            _warn_of_another_model(content, given.model.policy)

    def _last_checkpoint(self, root: str) -> str | None:
        """Return where the last run got to; Lightning itself looks in the folder of the run that is about to start."""
        path = last_checkpoint(root)
        if path is None and self.config.subcommand != "fit":
            raise ConfigurationError(f"ckpt_path: there is no checkpoint of any run in {root}; name one by its path.")
        # Not an error, so that the same command begins a run and goes on with it.
        rank_zero_info(f"Going on from {path}" if path else f"No run in {root} has a checkpoint yet: starting anew.")
        return str(path) if path else None

    def after_fit(self) -> None:
        """Say where the checkpoints are, and compare with the vanilla counterpart, if asked to."""
        if checkpoints := kept_by(self.trainer):
            rank_zero_info(f"Checkpoints: {', '.join(checkpoints)}")
        if not self.config.fit.baseline or self.trainer.interrupted:
            return
        config = self.config.fit.clone()
        without = {"class_path": "prlhf_lightning.user_models.UniformUserModel", "init_args.num_tokens": 0}
        config.model.user_model = Namespace(without)  # type: ignore[no-untyped-call]
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
        if self.trainer.is_global_zero or is_sharded(self.model.policy):
            contenders = {
                "vanilla": Contender(fresh.model, trainer.callback_metrics),
                "personalised": Contender(self.model, self.trainer.callback_metrics),
            }
            written_to = None if config.trainer.fast_dev_run else folder
            compare(contenders, self.datamodule, written_to, quiet=not self.trainer.is_global_zero)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        config["callbacks"] = list(config["callbacks"] or [])
        wanted = config["enable_progress_bar"] is not False
        if wanted and not any(isinstance(callback, ProgressBar) for callback in config["callbacks"]):
            config["callbacks"].append(RichProgressBar())
        if config["logger"] is None:
            config["logger"] = CSVLogger(config["default_root_dir"] or _RUNS, name="")
        _check_writable(str(config["default_root_dir"] or _RUNS))
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {error}") from error
        if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
            raise ConfigurationError("trainer.strategy: the command line can't be sent to spawned processes; use ddp.")
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"seed_everything: {error}") from error


def _warn_of_another_model(checkpoint: dict[str, Any], policy: Any) -> None:
    """Warn where a checkpoint's adapters would be put on another model: of equal shape, it loads without an error."""
    trained = checkpoint.get("hyper_parameters", {}).get("policy")
    before = trained.get("init_args", {}).get("model") if isinstance(trained, dict) else None
    now = policy.get("init_args", {}).get("model") if policy else None
    if before and now and Path(before).resolve() != Path(now).resolve():
        rank_zero_warn(
            f"The checkpoint was trained on model.policy.model {before}, and this is {now}. What was trained fits no "
            "other weights, even where it can be loaded: make sure that they are the same."
        )


def _check_writable(folder: str) -> None:
    """Refuse a folder for the run's files that can't be written to, before anything is computed."""
    if "://" in folder:
        return
    try:
        check_writable(Path(folder))
    except OSError as error:
        raise ConfigurationError(
            f"trainer.default_root_dir: files can't be written to {folder} ({error.strerror}); give another folder."
        ) from error


def _listed(words: list[str]) -> list[str]:
    """Return a task's words with lists like `--users ann bob` in jsonargparse's form: `--users+ ann --users+ bob`."""
    result, option = [], ""
    for word in words:
        if word.startswith("--"):
            option = word if (words[0], word) in _LISTS else ""
        if not option:
            result.append(word)
        elif word != option:
            result += [option if word.startswith("[") else f"{option}+", word]
    return result


def main(args: ArgsType = None) -> None:
    """Run the command line; an error that a person can mend is printed without a stack trace."""
    for message in (
        ".*LeafSpec.*",  # Lightning's use of torch's pytree
        ".*overridden `on_before_batch_transfer`.*",  # on purpose
        ".*smaller than the logging interval.*",  # LogShortRuns sees to it
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises an add-on at each start, in the voice of a warning.
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: "litlogger" not in record.getMessage())
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:
        print(f"prlhf_lightning {__version__}")
        return
    Parser.tasks = TASKS
    Parser.commands = {*PRLHFCLI.subcommands(), *TASKS, *TASKS["users"], *TASKS["data"]}
    Parser.command = tuple(takewhile(Parser.commands.__contains__, words if isinstance(words, list) else ()))
    try:
        if isinstance(words, list) and words[:1] and words[0] in TASKS:
            auto_cli(TASKS, args=_listed(words), as_positional=False, parser_class=Parser)
        else:
            PRLHFCLI(args)
    except BrokenPipeError:  # whoever reads our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # An error of ours may come wrapped in those of the libraries that called us.
        told = next((said for e in _causes(error) if (said := _for_people(e))), None)
        if told is None:
            raise
        sys.exit(f"error: {told}")


def _for_people(error: BaseException) -> str:
    """Return what an error says of what to mend, or nothing."""
    if is_out_of_memory(error):
        return " ".join(getattr(error, "__notes__", []))
    # EarlyStopping answers a misspelt monitor with the names that there are, but with an error of no class of its own.
    # A class that lacks a package, such as WandbLogger, says which; what has a name is a fault in somebody's own file.
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        return str(error)
    is_early_stopping = str(error).startswith("Early stopping conditioned on metric")
    # An error of a process that loads batches comes with the stack trace of that process in its message.
    said = re.sub(r"(?s)\ACaught \w+ in DataLoader worker.*^[\w.]+Error: ", "", str(error), flags=re.MULTILINE).strip()
    return said if is_early_stopping or isinstance(error, PRLHFError | MisconfigurationException) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
