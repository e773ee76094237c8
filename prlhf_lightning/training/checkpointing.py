"""What is written to a checkpoint: the weights that were trained, and beside Lightning's own entries the users."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.data.tokenization import TokenizationSettings, tokenizer_identity
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import Policy
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.sharding import plain_name
from prlhf_lightning.user_models import UserModel

_RENDERING = ("chat_template", "user_text_format", "chat_template_args")  # a date is the checkpoint's unless it is set


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the weights that belong in a checkpoint: what is trained, and what losses and users keep."""
    buffers = {name for name, _ in module.named_buffers() if name.startswith(("user_model.", "loss."))}
    return {plain_name(name) for name, param in module.named_parameters() if param.requires_grad} | buffers


def names_of(module: nn.Module, tables: Sequence[Tensor]) -> list[str]:
    """Return the names of some of a module's parameters, in their order."""
    names = {id(param): name for name, param in module.named_parameters()}
    return [names[id(table)] for table in tables if id(table) in names]


def fill(
    checkpoint: dict[str, Any],
    module: nn.Module,
    user_model: UserModel,
    users: UserVocabulary | None,
    seed: int,
    tokenization: Mapping[str, Any],
) -> None:
    """Keep of a module's weights what was trained, and put the entry beside it.

    Args:
        checkpoint: As Lightning has made it, with all weights.
        module: What they are of.
        user_model: A part of it.
        users: Those whose rows its tables hold.
        seed: What chance was drawn from.
        tokenization: How the data module made ids of text, so that prompts are written as in training.
    """
    kept = trained_names(module)
    weights = {name: weight for name, weight in checkpoint["state_dict"].items() if name in kept}
    checkpoint["state_dict"] = weights
    checkpoint[KEY] = {
        "format": FORMAT,
        "users": list(users.ids) if users is not None else [],
        # So that users can be added to and removed from a file without building its model.
        "new_rows": _new_rows(names_of(module, user_model.row_tables()), user_model, weights),
        "shares": names_of(module, user_model.share_tables()),  # tables whose rows are unnormalized weights
        "seed": seed,
        "tokenization": dict(tokenization),
    }


def _new_rows(names: Sequence[str], user_model: UserModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, by the table's name, the row of each table that a user gets who is added."""
    if not weights.keys() >= set(names):  # frozen, or held by another process
        return {}
    rows = user_model.new_rows([weights[name] for name in names])
    return {name: row.detach().clone() for name, row in zip(names, rows, strict=True)}


def base_of(policy: Policy) -> dict[str, str] | None:
    """Return what tells a policy's base model and its tokenizer, or None where the policy cannot tell."""
    found = policy.base_identity()
    with suppress(ConfigurationError):  # a base without a tokenizer is no error: data may come with another one
        tokenizer = getattr(policy, "tokenizer", None)
        if found is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
            return {**found, "tokenizer": tokenizer_identity(tokenizer)}
    return found


def warn_of_other_rendering(source: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where rows are rendered as other text than weights were trained on.

    Args:
        source: Where the weights are from.
        earlier: How the rows that they were trained on became ids; older versions told less of it.
        now: How rows become ids.
    """
    # Files of earlier versions do not say whether their rows were conversations; theirs are taken to be as the new.
    known = {"conversations": now.get("conversations", False)} | dict(earlier)
    was, is_now = (asdict(TokenizationSettings.from_kept(kept)) for kept in (known, now))
    other = [
        f"data.{name} was {was[name]!r} and is {is_now[name]!r}"
        for name in _RENDERING
        if name in earlier and name in now and was[name] != is_now[name]
    ]
    if other:
        rank_zero_warn(f"{source} was trained on text rendered otherwise: {'; '.join(other)}.")


def id_key_of(data: Any) -> str | None:
    """Return a fingerprint of the key that hashes the users' ids of a data module, which does not tell the key.

    It is empty where ids are not hashed, and None where that is not known, as without a data module.
    """
    if not hasattr(data, "pseudonyms"):
        return None
    return "" if data.pseudonyms is None else str(data.pseudonyms.fingerprint())


def warn_of_other_id_key(source: str, earlier: str | None, now: str | None) -> None:
    """Warn where users' ids are hashed otherwise than those of a checkpoint, so that no user is found in it.

    Args:
        source: Where the weights are from.
        earlier: `id_key_of` the data that they were trained on; older versions did not keep it.
        now: The same of the data that are used.
    """
    if earlier is None or now is None or earlier == now:
        return
    if not earlier or not now:
        was, is_now = ("hashed" if key else "not hashed" for key in (earlier, now))
        what = f"the users' ids {was}, and here they are {is_now}"
    else:
        what = "the users' ids hashed with another salt than this one"
    rank_zero_warn(
        f"{source} has {what}: the same user has another id, so that every user counts as new. Set "
        "data.hash_user_ids_with as in the run that it is of."
    )


def warn_of_other_users(users: UserVocabulary, of_data: UserVocabulary) -> None:
    """Say what becomes of the data's training users where a checkpoint, whose rows are kept, has others."""
    new = sum(user_id not in users for user_id in of_data.ids)
    if new:
        rank_zero_warn(
            f"The checkpoint knows {len(users) - 1} users, and its rows are kept. {new} of the data's "
            f"{len(of_data) - 1} training users are not among them and are treated as the generic user. To train on "
            "new users start from the checkpoint with --init_from (in Python, `module.start_from(path)`)."
        )


_NAMED = 3  # a wrong rank shows in every layer; a few parameters tell as much as all
_LISTED = 5  # missing or unexpected weights


def check_shapes(saved: Mapping[str, Tensor], here: Mapping[str, Sequence[int]], tables: Collection[str]) -> None:
    """Raise where a weight of a checkpoint has another shape than the model's of the same name.

    Args:
        saved: The checkpoint's weights by name.
        here: The shapes of the model's.
        tables: Names of those that have one row a user.

    Raises:
        ConfigurationError: Names the weights, both shapes, and the settings that they follow from.
    """
    other = [name for name, weight in saved.items() if name in here and tuple(weight.shape) != tuple(here[name])]
    if not other:
        return
    shapes = [f"{name} is {list(saved[name].shape)} there and {list(here[name])} here" for name in other[:_NAMED]]
    if len(other) > _NAMED:
        shapes.append(f"and so on for {len(other) - _NAMED} more")
    causes = dict.fromkeys(_cause(name, saved[name], here[name], name in tables) for name in other)
    raise ConfigurationError(
        f"The checkpoint does not fit this model, which has {'; '.join(causes)}. Use what it was trained with. "
        f"({'; '.join(shapes)}.)"
    )


def check_names(missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise where a checkpoint lacks weights that are trained here, or has others.

    Args:
        missing: Names of the trained weights that it lacks.
        unexpected: Names of those that the model lacks.

    Raises:
        ConfigurationError: Names the first of them.
    """
    if missing or unexpected:
        raise ConfigurationError(
            "The checkpoint does not fit this model. Use the user_model, policy and loss that it was trained "
            f"with. Missing: {sorted(missing)[:_LISTED]}; not in the model: {list(unexpected)[:_LISTED]}."
        )


def _cause(name: str, saved: Tensor, here: Sequence[int], is_table: bool) -> str:
    if is_table and [*saved.shape[:1]] != [*here[:1]]:
        return f"another number of users ({len(saved) - 1} in the checkpoint, {here[0] - 1} in this model)"
    if name.startswith("user_model."):
        return "other settings of model.user_model (such as num_tokens or num_clusters), or a policy of another width"
    if ".lora_" in name:
        side = 0 if ".lora_A." in name else 1  # A is [rank, in], B is [out, rank]
        if saved.dim() == 2 and saved.shape[side] != here[side]:
            return f"another policy.lora.rank ({saved.shape[side]} in the checkpoint, {here[side]} in this model)"
    return "another policy.model"


class ChecksummedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints in one step with a seal, and loads only those that are whole.

    A `PersonalizedLM` sees to it that its Trainer uses this; with other modules, give it to the Trainer:
    `Trainer(plugins=[SealedCheckpointIO()])`. Folders (checkpoints in shards) and what is on other file systems are
    left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; one that was there is replaced when the new one is complete.

        Raises:
            CheckpointWriteError: The disk is full, or the like; what was there is untouched.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            checkpoint_files.save(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return what a checkpoint holds; only an explicit `weights_only=False` lets it run code.

        Raises:
            DamagedCheckpointError: The file is not what was written.
        """
        safely = weights_only is not False
        if not is_local(path) or not Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only=safely)
        content: dict[str, Any] = checkpoint_files.load(Path(path), map_location, weights_only=safely)
        return content


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's, and not a URL."""
    return "://" not in str(path)


def use_checksummed_files(trainer: Trainer) -> None:
    """Have a trainer write and read sealed files, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = ChecksummedCheckpointIO()


KEY = "prlhf_lightning"
#: Raised when files can no longer be read by versions that read the last one.
FORMAT = 1


def entry_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a checkpoint that this version can read.

    Raises:
        ConfigurationError: It has none, or one that only a newer version understands.
    """
    found = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, dict):
        raise ConfigurationError("This checkpoint was not written by prlhf_lightning: it holds no users.")
    number = found.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise ConfigurationError(
            f"This checkpoint has format {number}, and this version of prlhf_lightning reads formats up to {FORMAT}. "
            "Use the version that wrote it, or a later one."
        )
    users = found.get("users")
    if not isinstance(number, int) or not isinstance(users, list) or not all(isinstance(user, str) for user in users):
        raise ConfigurationError("This checkpoint's list of users is not one; use a checkpoint that `fit` wrote.")
    return found


def users_of(checkpoint: Mapping[str, Any]) -> UserVocabulary:
    """Return the users of a checkpoint; raises as `entry_of`."""
    return UserVocabulary(entry_of(checkpoint)["users"])
