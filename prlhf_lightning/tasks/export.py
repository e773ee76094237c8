"""A trained policy as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.tasks.checkpoints import load_module


def export(checkpoint: Path, folder: Path) -> None:
    """Write the policy of a checkpoint as a Hugging Face model folder, adapters merged, with its tokenizer.

    The folder is what `AutoModelForCausalLM.from_pretrained` and `--model.policy.model` read. It holds no users.

    Args:
        checkpoint: A checkpoint of a model that the command line trained.
        folder: Where the files go; made if it is not there.
    """
    policy = load_module(checkpoint, "checkpoint").policy
    if not isinstance(policy, CausalLMPolicy):
        raise ConfigurationError(
            f"checkpoint: its policy is a {type(policy).__name__}; only CausalLMPolicy has the format that this writes."
        )
    policy.merged().save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    rank_zero_info(f"The model is in {folder}")
