"""Length control in online RL: a penalty of long completions, as a part of the reward."""

from __future__ import annotations

from torch import Tensor

from prlhf_lightning.errors import ConfigurationError


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Return 0 up to `max_length - buffer` tokens, then linearly less, to -1 from `max_length` on; `[B]`.

    Add it to the rewards: the soft overlong punishment of DAPO (arXiv:2503.14476, Eq. 13).

    Args:
        lengths: `[B]` number of tokens of each completion.
        max_length: Length from which the penalty is full.
        buffer: Number of tokens over which the penalty grows, from 1 to `max_length`.

    Raises:
        ConfigurationError: The buffer is not between 1 and `max_length`.
    """
    if not 1 <= buffer <= max_length:
        raise ConfigurationError(
            f"overlong_penalty: buffer is {buffer}; it must be from 1 to max_length, {max_length}."
        )
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)
