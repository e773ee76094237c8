"""Content of checkpoints: trained weights, and an entry with the users and settings next to Lightning's own entries."""

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
from prlhf_lightning.training.checkpoint_entry import FORMAT, KEY
from prlhf_lightning.training.sharding import plain_name
from prlhf_lightning.user_models import UserModel

_RENDERING = ("chat_template", "user_text_format", "chat_template_args")  # the date defaults to the checkpoint's


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the weights in a checkpoint: trained ones, and the buffers of these parts."""
    parts = ("user_model.", "loss.", "features.")
    buffers = {name for name, _ in module.named_buffers() if name.startswith(parts)}
    return {plain_name(name) for name, param in module.named_parameters() if param.requires_grad} | buffers


def names_of(module: nn.Module, tables: Sequence[Tensor]) -> list[str]:
    """Return the names of `tables`, which are parameters of a module, in the same order."""
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
    """Reduce a checkpoint to the trained weights and add this package's entry.

    Args:
        checkpoint: Lightning's checkpoint with all weights; it is changed.
        module: The module with these weights.
        user_model: A part of it.
        users: The users, in the order of the tables' rows.
        seed: The random seed.
        tokenization: The data module's tokenization settings, so that prompts are rendered as in training.
    """
    kept = trained_names(module)
    weights = {name: weight for name, weight in checkpoint["state_dict"].items() if name in kept}
    checkpoint["state_dict"] = weights
    checkpoint[KEY] = {
        "format": FORMAT,
        "users": list(users.ids) if users is not None else [],
        # With this, users can be added and removed without building the model.
        "new_rows": _new_rows(names_of(module, user_model.row_tables()), user_model, weights),
        "shares": names_of(module, user_model.share_tables()),  # tables whose rows are unnormalized weights
        "seed": seed,
        "tokenization": dict(tokenization),
    }


def _new_rows(names: Sequence[str], user_model: UserModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the row of a new user in each table, by the table's name."""
    if not weights.keys() >= set(names):  # frozen, or held by another process
        return {}
    rows = user_model.new_rows([weights[name] for name in names])
    return {name: row.detach().clone() for name, row in zip(names, rows, strict=True)}


def base_of(policy: Policy) -> dict[str, str] | None:
    """Return the digests of a policy's base model and tokenizer, or None if the policy has none."""
    found = policy.base_identity()
    with suppress(ConfigurationError):  # no error: the data may use another tokenizer
        tokenizer = getattr(policy, "tokenizer", None)
        if found is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
            return {**found, "tokenizer": tokenizer_identity(tokenizer)}
    return found


def rendering_of(data: Any) -> dict[str, Any]:
    """Return the tokenization settings of a data module, as stored in checkpoints; empty for other data modules."""
    settings = getattr(data, "settings", None)
    if settings is None:
        return {}
    # With `conversations`, plain prompts are also rendered as conversations, if the model was trained on them.
    return {**asdict(settings), "conversations": getattr(data, "conversational", False)}


def warn_of_other_rendering(source: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if rows are rendered differently from the rows that the weights were trained on.

    Args:
        source: Origin of the weights, for the message.
        earlier: Tokenization settings of their training; older versions stored fewer of them.
        now: Tokenization settings now.
    """
    # Files of earlier versions do not say whether their rows were conversations; the current setting is assumed.
    known = {"conversations": now.get("conversations", False)} | dict(earlier)
    was, is_now = (asdict(TokenizationSettings.from_kept(kept)) for kept in (known, now))
    other = [
        f"data.{name} was {was[name]!r} and is {is_now[name]!r}"
        for name in _RENDERING
        if name in earlier and name in now and was[name] != is_now[name]
    ]
    if other:
        rank_zero_warn(f"{source} was trained with other rendering settings: {'; '.join(other)}.")


def id_key_of(data: Any) -> str | None:
    """Return a fingerprint of the key that hashes a data module's user ids; it does not reveal the key.

    It is empty if ids are not hashed, and None if that is unknown, as without a data module.
    """
    if not hasattr(data, "pseudonyms"):
        return None
    return "" if data.pseudonyms is None else str(data.pseudonyms.fingerprint())


def warn_of_other_id_key(source: str, earlier: str | None, now: str | None) -> None:
    """Warn if user ids are hashed differently from those of a checkpoint, so that no user is found in it.

    Args:
        source: Origin of the weights, for the message.
        earlier: `id_key_of` the training data; older versions did not store it.
        now: `id_key_of` the data now.
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
        "data.hash_user_ids_with as in its run."
    )


def warn_of_other_users(users: UserVocabulary, of_data: UserVocabulary) -> None:
    """Warn if training users of the data are not in a checkpoint whose rows are kept."""
    new = sum(user_id not in users for user_id in of_data.ids)
    if new:
        rank_zero_warn(
            f"The checkpoint knows {len(users) - 1} users, and its rows are kept. {new} of the data's "
            f"{len(of_data) - 1} training users are not among them and are treated as the generic user. To train on "
            "new users start from the checkpoint with --init_from (in Python, `module.start_from(path)`)."
        )


_NAMED = 3  # a wrong rank appears in every layer; a few parameters are enough
_LISTED = 5  # missing or unexpected weights


def check_shapes(saved: Mapping[str, Tensor], here: Mapping[str, Sequence[int]], tables: Collection[str]) -> None:
    """Raise if a weight of a checkpoint and the model's weight of the same name differ in shape.

    Args:
        saved: The checkpoint's weights by name.
        here: The shapes of the model's weights.
        tables: Names of the weights with one row per user.

    Raises:
        ConfigurationError: Names the weights, both shapes, and the settings that determine them.
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
    """Raise if a checkpoint lacks trained weights of the model, or has additional ones.

    Args:
        missing: Names of the trained weights that the checkpoint lacks.
        unexpected: Names of the weights that the model lacks.

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
    """Writes checkpoints atomically with a checksum, and loads only intact ones.

    A `PersonalizedLM` makes its Trainer use this. With other modules, pass it:
    `Trainer(plugins=[ChecksummedCheckpointIO()])`. Lightning handles folders (sharded checkpoints) and other file
    systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; an existing file is replaced once the new one is complete.

        Raises:
            CheckpointWriteError: The system refused the write, such as on a full disk; the old file is unchanged.
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
        """Return the content of a checkpoint; only an explicit `weights_only=False` lets it run code.

        Raises:
            DamagedCheckpointError: The file is damaged.
        """
        safely = weights_only is not False
        if not is_local(path) or not Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only=safely)
        content: dict[str, Any] = checkpoint_files.load(Path(path), map_location, weights_only=safely)
        return content


def is_local(path: str | Path) -> bool:
    """Return whether a path is on this machine, and not a URL."""
    return "://" not in str(path)


def use_checksummed_files(trainer: Trainer) -> None:
    """Make a trainer use `ChecksummedCheckpointIO`, unless it has another plugin for checkpoints."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = ChecksummedCheckpointIO()
