"""`fit`, `validate`, `test` and `predict`: runs that Lightning's command line configures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]  # it has no stubs
from jsonargparse import Namespace, dict_to_namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from prlhf_lightning.adaptation import ShrinkUsers
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.earlier_runs import (
    configuration_of_run,
    is_start_of,
    last_checkpoint,
    tell_of_changes,
    with_configuration,
)
from prlhf_lightning.cli.parser import Explaining
from prlhf_lightning.cli.shipped_configs import with_shipped_configs
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.errors import CheckpointWriteError, ConfigurationError, NonFiniteError
from prlhf_lightning.reports.comparison import Contender, compare
from prlhf_lightning.reports.evaluation_table import evaluation_table
from prlhf_lightning.reports.gain import gain_sentence
from prlhf_lightning.training import PersonalizedLM, checkpoint_files
from prlhf_lightning.training.callbacks import CollapseMonitor, ExplainOutOfMemory, LearningMonitor, StopOnSignal
from prlhf_lightning.training.callbacks.outputs import (
    BestAndLast,
    LogShortRuns,
    PredictionWriter,
    SaveOnInterrupt,
    UserTable,
    kept_by,
)
from prlhf_lightning.training.callbacks.stats import TrainingStats
from prlhf_lightning.training.checkpoint_entry import is_reward_model
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.training.loggers import (
    MetricsTable,
    folders_of_runs,
    hyper_parameters,
    keep_under,
    run_folder,
    with_run_folder,
)
from prlhf_lightning.training.run_history import RunHistory
from prlhf_lightning.training.sharding import is_sharded
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.cache_dir import resolve_path
from prlhf_lightning.utils.config_checksum import add_checksum
from prlhf_lightning.utils.io import atomic_write_bytes
from prlhf_lightning.utils.load_errors import opening
from prlhf_lightning.utils.terminal import plain_console
from prlhf_lightning.utils.trust import words_of_user

_RUNS = "runs"  # default folder of runs


#: Settings of data, and of sources, that are paths.
_PATHS = frozenset(
    ("train", "validation", "test", "files", "folder", "koala", "pool", "url", "users_file", "train_file", "path")
)

_FORMATS = ("csv", "json", "parquet", "arrow", "text")  # used in place of a path, for `datasets`


class Parser(Explaining, LightningArgumentParser):
    """Lightning's parser, which explains mistakes in a few lines."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse words; without a configuration, a command about a checkpoint uses that of the checkpoint's run."""
        words = with_shipped_configs(sys.argv[1:] if args is None else args)
        tell_of_changes(words)
        if (config := configuration_of_run(words, _RUNS)) is not None:
            words = with_configuration(words, config)
        return super().parse_args(words, *others, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, and logs the settings as hyper-parameters."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, which all processes must ask for, and save."""
        self._folder = str(trainer.log_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file with a checksum, and log the settings to all loggers but the first."""
        if "://" in self._folder:
            self.parser.save(self.config, f"{self._folder}/{self.config_filename}", skip_none=False, overwrite=True)
        else:
            path = Path(self._folder, self.config_filename)
            atomic_write_bytes(path, self.parser.dump(self.config, skip_none=False).encode())
            add_checksum(path)
        settings = hyper_parameters(self.config.as_dict())
        for logger in trainer.loggers[1:]:
            logger.log_hyperparams(settings)


class PRLHFCLI(LightningCLI):
    """LightningCLI for a `PersonalizedLM` and a `PreferenceDataModule`, with shared settings linked.

    Args:
        args: Command line, or the configuration itself; `sys.argv` by default.
    """

    #: The classes that the commands configure, and the argument of the model that names its base model.
    model_type: type[LightningModule] = PersonalizedLM
    data_type: type[PreferenceDataModule] = PreferenceDataModule
    base = "policy"
    #: The callback that tells about the training of such a model.
    about_training: type[Callback] = LearningMonitor

    def __init__(self, args: ArgsType = None) -> None:
        self._claimed: Path | None = None  # the run's folder
        try:
            with words_of_user():
                self._run(args)
        except (CheckpointWriteError, NonFiniteError) as error:
            raise type(error)(f"{error}{self._how_to_go_on()}") from error
        finally:
            if self._claimed:  # the run failed before it wrote anything
                with suppress(OSError):
                    self._claimed.rmdir()

    def _how_to_go_on(self) -> str:
        """Return how to resume a failed fit, to add to the error."""
        trainer = getattr(self, "trainer", None)
        if trainer is None or self.subcommand != "fit":
            return ""
        folders = [Path(one.dirpath) for one in trainer.checkpoint_callbacks if one.dirpath]
        newest = next((path for folder in folders if (path := checkpoint_files.newest_intact(folder))), None)
        return f" To resume, use the same command and --ckpt_path {newest}" if newest else ""

    def _run(self, args: ArgsType) -> None:
        super().__init__(
            self.model_type,
            self.data_type,
            trainer_defaults=self._trainer_defaults(),
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=args,
        )

    def _trainer_defaults(self) -> dict[str, Any]:
        return {
            "max_epochs": 1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "use_distributed_sampler": False,  # the data module's sampler distributes batches to processes
            "enable_model_summary": False,
            "callbacks": [
                SaveOnInterrupt(),
                StopOnSignal(),
                ExplainOutOfMemory(),
                RunHistory(),
                UserTable(),
                PredictionWriter(),
                LogShortRuns(),
                TrainingStats(),
                self.about_training(),
            ],
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of fixed callbacks, and link settings that data and model share."""
        read_whole_numbers_first(parser)
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(CollapseMonitor, "collapse")
        parser.link_arguments("model.policy", "data.tokenizer", lambda policy: policy.tokenizer, "instantiate")
        parser.link_arguments("model.loss", "data.feedback", lambda loss: loss.feedback, "instantiate")
        parser.link_arguments("model.user_model", "data.history_size", lambda users: users.history_size, "instantiate")
        parser.add_argument(
            "--train_baseline",
            type=bool,
            default=False,
            help="After fit, train the same policy on the same data and steps without a user model (for a DPO loss: "
            "vanilla DPO), and print the two side by side.",
        )
        parser.add_argument(
            "--shrink_users",
            type=bool,
            default=True,
            help="At the end of fit, move all user rows toward the generic user if held-out pairs show that they also "
            "fit noise; see docs/adapt.md.",
        )
        self._add_init_from(parser)

    def _add_init_from(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Start fit from the weights and users of this checkpoint (or its run's folder, `last`, or an exported "
            "folder), with a new optimizer and schedule: to train further on new votes, also of new users. To resume "
            "a run that was stopped, use --ckpt_path. See docs/checkpoints.md.",
        )

    def _name_from_the_root(self) -> None:
        """Make the paths of model and data absolute, so that commands about a run work in any folder.

        Paths are relative to the current folder, or else to the folder of their configuration file.
        """
        config = self.config[self.config.subcommand]
        folders = [Path.cwd(), *(Path(str(file.absolute)).parent for file in config.get("config") or ())]
        _locate_data(config.data, folders)
        trainer = config.trainer
        root = str(trainer.default_root_dir or _RUNS)
        trainer.default_root_dir = root if "://" in root else str(Path(root).expanduser().absolute())
        keep_under(trainer.default_root_dir, trainer.logger)
        settings = _settings(config.model[self.base])
        model = settings.get("model")
        if model and Path(found := resolve_path(model, folders)).is_dir():
            settings["model"] = found

    def _parse_ckpt_path(self) -> None:
        """Check that the checkpoint can be read; its weights are loaded later, and its settings are ignored.

        Lightning would silently replace the model's settings from the command line and the configuration by the
        checkpoint's hyper-parameters. They are not needed: every command configures the whole model.
        """
        self._name_from_the_root()
        given = self.config[self.config.subcommand]
        roots = folders_of_runs(given.trainer.default_root_dir or _RUNS, given.trainer.logger)
        source = None
        if given.get("init_from") and self.config.subcommand == "fit":
            given.init_from = _start_of_run(given.init_from, given.ckpt_path == "last", roots)
            source = checkpoint_files.origin(Path(given.init_from))
        if given.ckpt_path == "last":
            given.ckpt_path = self._last_checkpoint(roots, source)
        if given.ckpt_path and Path(given.ckpt_path).is_dir():
            given.ckpt_path = str(checkpoint_of(Path(given.ckpt_path), "ckpt_path"))
        path = str(given.ckpt_path or "")
        # Lightning itself finds these, and files on other file systems.
        is_found_later = path in ("", "hpc") or path.startswith("registry") or "://" in path
        if not is_found_later:
            content = read_checkpoint(path, "ckpt_path", weights_only=given.weights_only is not False)
            self._check_kind(path, content)
            _warn_of_another_model(content, given.model[self.base], self.base)
            if source and content and not is_start_of(source, content):
                rank_zero_warn(
                    f"The run of ckpt_path {path} was not started from init_from {given.init_from}, as far as its "
                    "checkpoint says: init_from is left out. To start a new run from it leave ckpt_path out."
                )

    def _check_kind(self, path: str, content: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of a reward model for a policy, and the reverse."""
        kinds = {"policy": "a policy (model.policy)", "backbone": "a reward model (model.backbone)"}
        found = "backbone" if content and is_reward_model(content) else "policy"
        if content and found != self.base:
            raise ConfigurationError(
                f"ckpt_path: {path} is of {kinds[found]}, and the configuration of {kinds[self.base]}; use the "
                "config.yaml of the checkpoint's run."
            )

    def _last_checkpoint(self, roots: Sequence[Path], source: Mapping[str, str] | None) -> str | None:
        """Return the last checkpoint of the last run; Lightning itself looks in the folder of the new run."""
        settings = None
        if self.config.subcommand == "fit":
            # As in the run's `config.yaml`.
            settings = yaml.safe_load(self._parser("fit").dump(self.config.fit))
        path, root = last_checkpoint(*roots, started_from=source, settings=settings), _listed(roots)
        if path is None and self.config.subcommand != "fit":
            raise ConfigurationError(f"ckpt_path: there is no checkpoint of any run in {root}; name one by its path.")
        # Not an error, so that the same command starts and resumes a run.
        began = f" that was started from {source['path']}" if source else ""
        anew = f"No run in {root}{began} has a checkpoint to resume: starting a new run{' from it' if source else ''}."
        rank_zero_info(f"Going on from {path}" if path else anew)
        return str(path) if path else None

    def after_validate(self) -> None:
        """Print the metrics."""
        self._print_evaluation("val")

    def after_test(self) -> None:
        """Print the metrics."""
        self._print_evaluation("test")

    def _print_evaluation(self, stage: str) -> None:
        model = self.model
        users = {name: model.user_table(name) for name in model.eval_sets if model.loss.feedback != "demonstrations"}
        if self.trainer.is_global_zero and model.eval_sets:
            plain_console().print(evaluation_table(self.trainer.callback_metrics, users, model.eval_sets, stage))

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # this package prints its own table
        return parser

    def before_fit(self) -> None:
        """Start from an earlier training if `init_from` is given and there is no checkpoint to resume."""
        given = self.config.fit
        if given.shrink_users:
            self.trainer.callbacks.append(ShrinkUsers())  # type: ignore[attr-defined]
        if not given.init_from:
            return
        if given.train_baseline:
            raise ConfigurationError(
                "init_from and train_baseline exclude one another: the baseline would be trained on these data "
                "alone, and the model on earlier ones as well. Leave out init_from, or give --train_baseline false."
            )
        if given.ckpt_path:
            return  # of the same run, or with a warning
        self.model.start_from(given.init_from)

    def after_fit(self) -> None:
        """Print the checkpoints and advice, and train and compare the baseline if `train_baseline` is set."""
        checkpoints = kept_by(self.trainer)
        if checkpoints:
            rank_zero_info(f"Checkpoints: {', '.join(checkpoints)}")
            if len(checkpoints) > 1:
                rank_zero_info("The first is the best, the second the last. Commands use the last of a run's folder.")
        (monitor,) = (one for one in self.trainer.callbacks if isinstance(one, LearningMonitor))  # type: ignore[attr-defined]
        if advice := monitor.advice(self.trainer, self.model):
            rank_zero_info(advice)
        if gain := self._gain():
            rank_zero_info(gain)
        if not self.config.fit.train_baseline or self.trainer.interrupted:
            return
        config = self.config.fit.clone()
        without = {"class_path": "prlhf_lightning.user_models.UniformUserModel", "init_args": {"num_tokens": 0}}
        config.model.user_model = dict_to_namespace(without)
        seed_everything(config.seed_everything)
        config.trainer.logger = None  # its logger is set below
        fresh = self._parser("fit").instantiate_classes(config)
        folder = run_folder(self.trainer)
        trainer = Trainer(
            **{
                **fresh.trainer.as_dict(),
                "logger": MetricsTable(folder, name="baseline", version=""),
                "callbacks": [] if fresh.trainer.enable_progress_bar is False else [RichProgressBar()],
                "enable_checkpointing": False,
            }
        )
        fresh.model.hparams["user_model"] = without  # Lightning stores the command's own there
        rank_zero_info("Training the same model without users, for comparison.")
        trainer.fit(fresh.model, fresh.data)
        if not config.trainer.fast_dev_run:
            # Not in a folder `checkpoints`, where `--ckpt_path last` would use it as the newest of the run.
            trainer.save_checkpoint(kept := folder / "baseline" / "last.ckpt")
            rank_zero_info(f"The baseline's checkpoint: {kept}")
        if self.trainer.is_global_zero or is_sharded(self.model.policy):
            contenders = {
                "vanilla": Contender(fresh.model, trainer.callback_metrics),
                "personalized": Contender(self.model, self.trainer.callback_metrics),
            }
            written_to = None if config.trainer.fast_dev_run else folder
            compare(contenders, self.datamodule, written_to, quiet=not self.trainer.is_global_zero)

    def _gain(self) -> str | None:
        """Return what personalization gains on held-out pairs of seen users; all processes must call this."""
        names = (f"val/seen/{name}" for name in ("generic_accuracy", "generic_auc"))
        if not any(name in self.trainer.callback_metrics for name in names):
            return None  # not validated, or users do not differ
        own, generic = (self.model.user_table("seen", is_generic) for is_generic in (False, True))
        return gain_sentence(own, generic)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        config["callbacks"] = list(config["callbacks"] or [])
        wanted = config["enable_progress_bar"] is not False
        if wanted and not any(isinstance(callback, ProgressBar) for callback in config["callbacks"]):
            config["callbacks"].append(RichProgressBar())
        # Lightning's own default is the current directory.
        root = str(config["default_root_dir"] or _RUNS)
        root = config["default_root_dir"] = root if "://" in root else os.path.expanduser(root)
        if not config["fast_dev_run"]:
            config["logger"], self._claimed = _with_run_folder(config["logger"], root)
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {error}") from error
        path = self.config[self.config.subcommand].ckpt_path  # during `fit`, the trainer does not say it
        lightning_compat.wrap_restoring(
            trainer, lambda: opening(f"ckpt_path: {path or trainer.ckpt_path}", "Use a checkpoint that `fit` wrote.")
        )
        if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
            raise ConfigurationError("trainer.strategy: spawned processes cannot get the command line; use ddp.")
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"seed_everything: {error}") from error


def read_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Make `limit_val_batches: 1` mean one batch, while 1.0 means all of them.

    Python caches a union of types in the order of its first use. If that is float before int (as in rich), jsonargparse
    reads the 1 of Lightning's `int | float` as 1.0.
    """
    for action in parser._actions:
        types = get_args(getattr(action, "_typehint", None))
        if {int, float} <= set(types) and types.index(float) < types.index(int):
            whole_first = reduce(or_, (int, *(one for one in types if one is not int)))
            vars(action)["_typehint"] = whole_first  # undeclared in jsonargparse


def _start_of_run(given: str, goes_on: bool, roots: Sequence[Path]) -> str:
    """Return the absolute path of the checkpoint or exported folder of `init_from`.

    Args:
        given: A path of a checkpoint or a run's folder, or `last`.
        goes_on: Whether the same command also resumes its run (`--ckpt_path last`).
        roots: Folders of runs.
    """
    if given == "last" and goes_on:
        raise ConfigurationError(
            "init_from: with --ckpt_path last, `last` may be the run to start from or the started run. Give "
            "the path of the checkpoint to start from."
        )
    found = last_checkpoint(*roots) if given == "last" else Path(given).expanduser()
    if found is None:
        raise ConfigurationError(
            f"init_from: there is no checkpoint of any run in {_listed(roots)}; name one by its path."
        )
    # Absolute, since the run's configuration is stored in another folder.
    is_exported = (found / "prlhf.json").is_file()
    return str((found if is_exported else checkpoint_of(found, "init_from")).absolute())


def _listed(folders: Iterable[Path]) -> str:
    return " or ".join(map(str, folders))


def _settings(component: Any) -> Any:
    """Return the settings of a component, which has a class of its own or not; empty for none."""
    return component.get("init_args", component) if component else {}


def _warn_of_another_model(checkpoint: dict[str, Any], component: Any, base: str) -> None:
    """Warn if trained weights would be loaded into another model: with equal shapes, that raises no error."""
    trained = checkpoint.get("hyper_parameters", {}).get(base)
    before = _settings(trained).get("model") if isinstance(trained, dict) else None
    now = _settings(component).get("model")
    if before and now and Path(before).resolve() != Path(now).resolve():
        rank_zero_warn(
            f"The checkpoint was trained on model.{base}.model {before}, and this is {now}. Trained weights fit no "
            "other model, even if they can be loaded: make sure that the models are the same."
        )


def _with_run_folder(loggers: Any, root: str) -> tuple[list[Logger], Path | None]:
    """Call `with_run_folder`, and refuse a folder that is not writable, before anything is computed."""
    try:
        return with_run_folder(loggers, root)
    except OSError as error:
        folder = str(error.filename or root)
        setting = "trainer.default_root_dir" if folder.startswith(root) else "trainer.logger"
        raise ConfigurationError(
            f"{setting}: cannot write files to {folder} ({error.strerror}); give another folder."
        ) from error


def run_training(args: ArgsType, program: str) -> None:
    """Run a command of Lightning's.

    Args:
        args: The words of the command line, or the configuration.
        program: Name of the command, for messages.
    """
    Parser.called = program
    match _kind_of_model(args):
        case "backbone":
            from prlhf_lightning.cli.fit_reward import RewardCLI  # it is a subclass of PRLHFCLI

            RewardCLI(args)
        case "rewards":
            from prlhf_lightning.cli.fit_online import OnlineCLI

            OnlineCLI(args)
        case _:
            PRLHFCLI(args)


_KINDS = ("backbone", "rewards")


def _kind_of_model(args: ArgsType) -> str | None:
    """Return which setting of `model`, in words or in a file, tells what a command trains.

    Returns:
        `backbone` for a reward model, `rewards` for online RL, and otherwise None.
    """
    if args is not None and not isinstance(args, list):
        parts = [(part or {}).get("model") or {} for part in dict(args).values() if part]
        return next((kind for kind in _KINDS if any(kind in part for part in parts)), None)
    words: list[str] = with_shipped_configs(sys.argv[1:] if args is None else args)
    of_run = configuration_of_run(words, _RUNS)
    files: list[str | Path] = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-c", "--config")]
    files += [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    models = [_model_of_file(Path(file)) for file in (*files, *filter(None, [of_run]))]
    for kind in _KINDS:
        if any(word.startswith(f"--model.{kind}") for word in words) or any(kind in model for model in models):
            return kind
    return None


def _model_of_file(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # the parser says what is wrong with it
    model = content.get("model") if isinstance(content, dict) else None
    return model if isinstance(model, dict) else {}


def _locate_data(settings: Any, folders: Sequence[Path]) -> None:
    """Make the file paths of a source, and of its nested sources, absolute, in place."""
    if isinstance(settings, list):
        for one in settings:
            _locate_data(one, folders)
        return
    if not isinstance(settings, Namespace):
        return
    for name, value in list(vars(settings).items()):
        if isinstance(value, Namespace | list) and not (name in _PATHS and isinstance(value, list)):
            _locate_data(value, folders)
        elif name in _PATHS and isinstance(value, list):
            settings[name] = [resolve_path(str(one), folders) for one in value]
        elif name in _PATHS and isinstance(value, str | Path) and value not in _FORMATS:
            settings[name] = resolve_path(str(value), folders)
