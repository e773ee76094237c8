"""The callback that ends a training with user rows as believable as the held-out pairs say."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from prlhf_lightning.adaptation.shrinkage import MOST_PAIRS, known_rows, margins_by_factor, trained_tables
from prlhf_lightning.data import PreferenceDataModule
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.splits import spread
from prlhf_lightning.training import PersonalizedLM, checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of
from prlhf_lightning.training.checkpointing import is_local
from prlhf_lightning.training.distributed import gather_objects, holds_whole_model
from prlhf_lightning.training.user_rows import UserRows, move_toward
from prlhf_lightning.types import PreferenceBatch, select_pairs
from prlhf_lightning.utils import lightning_compat
from prlhf_lightning.utils.finite import are_finite

_GRID = [step / 20 for step in range(21)]
# Half the 95% quantile of chi squared with one degree of freedom: a likelihood ratio that chance rarely gives (Wilks
# 1938). Without it, the rows of small data would move with the noise of a few held-out pairs.
_EVIDENCE = 1.92


class ShrinkUsers(Callback):
    """Moves user rows toward the generic user at the end of a training, if held-out pairs show that they fit noise.

    All rows move by one factor, the most likely one for the held-out pairs of trained users (see `fit_shrinkage`), in
    the module and in every checkpoint that is kept; a checkpoint of another step has a factor of its own. Files are
    replaced one by one, each as a whole. Their entry `shrunk` holds the factor. The optimizer's averages stay as they
    are: they are averages of gradients, and not of rows. The metrics are those of the moved rows.

    Rows stay as they are, and nothing is computed, if the last validation does not speak against them. Nothing is done
    in a trial run, after an interruption, without validation, and where no rows are trained from pairs. With a sharded
    policy the result is a line that names the command.
    """

    def __init__(self) -> None:
        self._factors: dict[int, float] = {}  # by step, from validations; approximate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the last callback, so that checkpoints are written before."""
        trainer.callbacks = [*(one for one in trainer.callbacks if one is not self), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._factors = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the factor from the validation, which scores each pair for its user and for the generic user."""
        if trainer.sanity_checking or not _applies(pl_module, trainer) or pl_module.user_model.history_tables():
            return  # without its pairs, too, a user is more than a new one
        if (margins := pl_module.margins("seen")) is not None and margins.shape[1]:
            self._factors[trainer.global_step] = most_likely((0.0, 1.0), margins)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shrink the rows of the module and of the kept checkpoints."""
        if not _applies(pl_module, trainer):
            return
        last = trainer.global_step
        if not holds_whole_model(trainer):
            if self._factors.get(last, 1.0) < 1.0:
                rank_zero_info(
                    "User rows also fit noise, which held-out pairs show. A sharded model's rows are not changed here: "
                    "run `prlhf-lightning shrink` on the checkpoint."
                )
            return
        pairs = _held_out(trainer, pl_module)
        factor = self._factor(last, trainer, pl_module, pairs)
        written = {}
        for path in _kept(trainer):
            content = checkpoint_files.load(path, mmap=True)
            step, own = content["global_step"], factor
            if step != last:
                if "shrunk" in entry_of(content) or self._factors.get(step) == 1.0:  # shrunk by an earlier fit
                    continue
                with _weights(pl_module, content["state_dict"]):
                    own = self._factor(step, trainer, pl_module, pairs)
            if own < 1.0:
                written[path.name] = own
                if trainer.is_global_zero:
                    _shrink_file(path, content, own, trained_tables(pl_module))
        if factor < 1.0:
            _shrink(pl_module, factor)
            lightning_compat.validate_within_fit(trainer)
        if factor < 1.0 or written:
            moved = ", ".join(f"{of:.2g} in {name}" for name, of in (written or {"the module": factor}).items())
            rank_zero_info(
                "User rows also fitted noise, which held-out pairs show. The rows now have only a part of their "
                f"distance from the generic user: {moved}."
            )

    def _factor(self, step: int, trainer: Trainer, module: PersonalizedLM, pairs: PreferenceBatch) -> float:
        """Return the most likely factor of the rows in the module; all processes must call this."""

        def best(*factors: float) -> float:
            tried = sorted(set(factors))
            with trainer.precision_plugin.forward_context():
                own = margins_by_factor(module, pairs, tried) if len(pairs) else torch.zeros(len(tried), 0)
            return most_likely(tried, torch.cat(gather_objects(trainer, own.float().cpu()), dim=1))

        # Margins are nearly linear in the factor, so two factors are enough to see that rows are as they should be.
        first = self._factors[step] if step in self._factors else best(0.0, 1.0)
        return first if first == 1.0 else best(0.0, first / 2, first, (first + 1) / 2, 1.0)


def most_likely(factors: Sequence[float], margins: Tensor) -> float:
    """Return the factor under which held-out pairs are most likely; 1 if it is not clearly better than 1.

    Args:
        factors: The F factors of the margins, ascending, from 0 to 1.
        margins: `[F, N]` margins of pairs; in between they are interpolated.
    """
    if not margins.shape[1] or not are_finite([margins]):
        return 1.0
    likelihoods = []
    for factor in _GRID:
        above = max(1, bisect_left(factors, factor))
        weight = (factor - factors[above - 1]) / (factors[above] - factors[above - 1])
        between = torch.lerp(margins[above - 1].double(), margins[above].double(), weight)
        likelihoods.append(float(F.logsigmoid(between).sum()))
    best = max(likelihoods)
    return _GRID[likelihoods.index(best)] if best - likelihoods[-1] > _EVIDENCE else 1.0


def _applies(module: LightningModule, trainer: Trainer) -> TypeGuard[PersonalizedLM]:
    """Return whether rows of users are trained from pairs, and validated."""
    return (
        isinstance(module, PersonalizedLM)
        and isinstance(trainer.datamodule, PreferenceDataModule)  # type: ignore[attr-defined]
        and not trainer.fast_dev_run  # type: ignore[attr-defined]
        and not trainer.overfit_batches  # type: ignore[attr-defined]
        and bool(trainer.limit_val_batches)
        and module.loss.feedback == "pairs"
        and "seen" in module.eval_sets
        and bool(module.user_model.row_tables() and trained_tables(module))
    )


def _held_out(trainer: Trainer, module: PersonalizedLM) -> PreferenceBatch:
    """Return this process's share of the held-out pairs of trained users."""
    pairs = trainer.datamodule.evaluation_pairs("seen")  # type: ignore[attr-defined]
    places = spread(len(pairs), MOST_PAIRS)[trainer.global_rank :: trainer.world_size]
    batch: PreferenceBatch = collate(pairs.__getitems__(places.tolist()))
    return select_pairs(batch, known_rows(module, batch).nonzero().flatten())


def _kept(trainer: Trainer) -> list[Path]:
    """Return the checkpoints of a run that all processes can read."""
    found: dict[Path, None] = {}
    for one in trainer.checkpoint_callbacks:
        if isinstance(one, ModelCheckpoint):
            named = (*one.best_k_models, one.best_model_path, one.last_model_path)
            found |= {Path(path).resolve(): None for path in named if path and is_local(path)}
    return [path for path in found if trainer.strategy.reduce_boolean_decision(path.is_file())]


@contextmanager
def _weights(module: PersonalizedLM, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a module the weights of a checkpoint within the block."""
    here = module.state_dict()
    own = {name: here[name].to("cpu", copy=True) for name in weights}
    module.load_state_dict(weights)
    try:
        yield
    finally:
        module.load_state_dict(own)


@torch.no_grad()
def _shrink(module: PersonalizedLM, factor: float) -> None:
    model = module.user_model
    read = {id(table) for table in model.history_tables()}
    tables = model.row_tables()
    for table, new in zip(tables, model.new_rows(tables), strict=True):
        if id(table) not in read:
            move_toward(new.clone(), table, factor)


def _shrink_file(path: Path, content: dict[str, Any], factor: float, tables: Sequence[str]) -> None:
    """Write a checkpoint with shrunk rows in the place of the old one, with its time: the newest stays the newest."""
    UserRows(content).shrink(factor, [f"user_model.{name}" for name in tables])
    entry_of(content)["shrunk"] = factor
    checkpoint_files.save(content, path, as_old_as=path)
