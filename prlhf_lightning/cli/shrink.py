"""The command `shrink`: user rows moved toward the generic user, fitted to held-out pairs."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from prlhf_lightning.adaptation import Shrinkage, fit_shrinkage
from prlhf_lightning.adaptation.margins import check_ranks_pairs
from prlhf_lightning.adaptation.shrinkage import MOST_PAIRS
from prlhf_lightning.cli.adapt import read_pairs
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import module_of, pick_device
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.batching import collate
from prlhf_lightning.data.privacy import hashed
from prlhf_lightning.data.splits import spread
from prlhf_lightning.errors import ConfigurationError, NonFiniteError
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.reports.run import data_of, open_run
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of, is_reward_model
from prlhf_lightning.training.user_rows import user_rows
from prlhf_lightning.types import PreferenceBatch
from prlhf_lightning.utils.finite import are_finite
from prlhf_lightning.utils.io import check_output
from prlhf_lightning.utils.terminal import plain_console


def shrink(
    model: Path,
    validation: Path | None = None,
    output: Path | None = None,
    columns: dict[str, str] | None = None,
    hash_user_ids_with: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Shrink all user rows toward the generic user by the factor with the highest held-out likelihood.

    Rows that were trained on few pairs, or for many steps, also fit noise. Factor 1 keeps the rows, 0 gives the generic
    user. `adapt` works better afterward, since its prior comes from these rows. `fit` does the same at its end,
    so this is for other checkpoints, and for other pairs than those of the run.

    Args:
        model: A checkpoint of `fit`, or the folder of its run.
        validation: Held-out pairs of its users, in any format that training reads; by default the held-out pairs of its
            run, according to the run's `config.yaml`.
        output: The checkpoint to write; without it, nothing is written.
        columns: Mapping of fields to the file's column names, as in `{user_id: worker}`.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    if validation is None and (columns or hash_user_ids_with):
        raise ConfigurationError("columns, hash_user_ids_with: these options need a file; give it with --validation.")
    if output is not None:
        check_output(output, "output")
    checkpoint = checkpoint_files.checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    if content and is_reward_model(content):
        raise ConfigurationError(
            f"model: {checkpoint} is a reward model, and its users need no shrinking: `fit` has chosen by held-out "
            "judgments how much they may differ (model.precision)."
        )
    users = user_rows(content, checkpoint)
    users.require_trained(checkpoint)
    module = module_of(content, checkpoint, "model", trust_remote_code, trust_classes).to(pick_device(device))
    if validation is None:
        pairs = _held_out(checkpoint, module, trust_classes)
    else:
        source = hashed(FileSource(validation, columns=columns), hash_user_ids_with)
        pairs, _ = read_pairs(module, source, option="validation")
    console = plain_console()
    earlier = entry_of(content).get("shrunk", 1.0)
    if earlier < 1.0:
        console.print(
            f"These rows have {earlier:g} of the distance that they were trained to; factors are of the rest."
        )
    with console.status("Trying factors"):
        found = fit_shrinkage(module, pairs)
    console.print(_table(found))
    if not are_finite([found.log_likelihoods]):
        raise NonFiniteError(
            "validation: under the model the likelihood of the pairs is infinite or NaN, so there is no best "
            "factor. Nothing is written; use an earlier checkpoint."
        )
    if output is not None:
        users.shrink(found.best, [f"user_model.{name}" for name in found.tables])
        if found.best < 1.0:
            entry_of(content)["shrunk"] = earlier * found.best
        checkpoint_files.save(content, output)
        how = f"rows {found.best:g} times as far from the generic user" if found.best < 1 else "rows as they were"
        console.print(f"Written to {output}, with {how}")


def _held_out(checkpoint: Path, model: PersonalizedModel, trust_classes: list[str] | None) -> PreferenceBatch:
    """Return validation pairs of trained users from a checkpoint's run, spread over all of them."""
    check_ranks_pairs(model)
    data = data_of(open_run(checkpoint), None, model, trust_classes)
    if data is None:
        raise ConfigurationError(
            f"validation: no config.yaml beside {checkpoint} says what its run held out; name a file of pairs that it "
            "was not trained on."
        )
    pairs = data.evaluation_pairs("seen")
    if pairs is None:
        raise ConfigurationError("validation: the run held out no pairs of its users; give a file of such pairs.")
    return collate(pairs.__getitems__(spread(len(pairs), MOST_PAIRS).tolist()))


def _table(found: Shrinkage) -> Table:
    table = Table(title=f"{found.pairs} pairs", title_justify="left")
    for name in ("factor", "log-likelihood a pair", "pair accuracy"):
        table.add_column(name, justify="right")
    for place, factor in enumerate(found.factors):
        style = "bold" if place == found.place else ""
        likelihood, accuracy = float(found.log_likelihoods[place]), float(found.accuracies[place])
        table.add_row(f"{factor:g}", f"{likelihood:.4f}", f"{accuracy:.4f}", style=style)
    return table
