"""Packing many trees in a row: whether a model takes it, and whether it gives the right numbers where it is."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.attention import take_block_masks, takes_block_masks
from prlhf_lightning.policies.scoring import Shortcuts
from prlhf_lightning.policies.shortcuts import trees_hold


class Packing:
    """Packing for one policy, which has asked for it by name.

    A model that can't be packed is scored as without it, and the user is warned.

    Args:
        lm: The model, whose attention takes block masks from now on.
        name: What the user calls it.
        shortcuts: What may be skipped with it.
    """

    def __init__(self, lm: PreTrainedModel, name: str, shortcuts: Shortcuts) -> None:
        self._name = name
        self._tried: set[torch.device] = set()
        self._fits = shortcuts.trees and take_block_masks(lm)
        if not self._fits:
            warnings.warn(
                f"policy.packing: {name!r} is a {type(lm).__name__} whose attention (attn_implementation "
                f"{lm.config._attn_implementation!r}; windows, recurrence, places other than by position ids) can't be "
                "told which completion a token belongs to; it is scored in padded rows.",
                stacklevel=3,
            )

    def applies(self, lm: PreTrainedModel, device: torch.device) -> bool:
        """Whether to pack on a device; the first time there, packing is tried on a few tokens.

        Raises:
            ConfigurationError: It gives other log-probabilities than padded rows do.
        """
        if not (self._fits and takes_block_masks(lm, device)):
            return False
        if device not in self._tried and not trees_hold(lm, device):
            raise ConfigurationError(
                f"policy.packing: packed rows don't give the log-probabilities of padded ones with {self._name!r} on "
                f"this device ({device}); set it to false."
            )
        self._tried.add(device)
        return True
