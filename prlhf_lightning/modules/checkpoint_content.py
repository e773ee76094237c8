"""What is written to a checkpoint: the weights that were trained, and beside Lightning's own entries the users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf_lightning.checkpoint_entry import FORMAT, KEY
from prlhf_lightning.data.tokenization import TokenizationSettings, tokenizer_identity
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.modules.sharding import plain_name
from prlhf_lightning.policies import Policy
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
        "shares": names_of(module, user_model.share_tables()),  # tables whose rows are unnormalised weights
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
