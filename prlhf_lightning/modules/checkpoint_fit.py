"""Whether the weights of a checkpoint are those of a model, and what it means where they are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from prlhf_lightning.errors import ConfigurationError

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
