"""Tell a checkpoint where its base model is now."""

from __future__ import annotations

from pathlib import Path

from prlhf_lightning import checkpoint_files
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.tasks.checkpoints import read_checkpoint
from prlhf_lightning.tasks.models import load_module


def rebase(checkpoint: Path, model: str, output: Path) -> None:
    """Write a copy of a checkpoint that loads its base model, which a checkpoint does not hold, from another place.

    For a checkpoint that came from another machine, or a model that was moved. It must be the same model: another one
    of the same shape would load as well, and write nonsense.

    Args:
        checkpoint: A checkpoint of `fit`.
        model: Folder or hub name of the base model.
        output: The checkpoint to write.
    """
    content = read_checkpoint(checkpoint, "checkpoint")
    settings = content.get("hyper_parameters", {}).get("policy", {}).get("init_args", {})
    if "model" not in settings:
        raise ConfigurationError(f"checkpoint: {checkpoint} names no base model, as checkpoints of CausalLMPolicy do.")
    before = settings["model"]
    settings["model"] = str(Path(model).resolve()) if Path(model).is_dir() else model
    trial = output.with_name(f"{output.name}.trial")
    try:  # before it takes the place of what is there, which may be the checkpoint itself
        checkpoint_files.save(content, trial)
        load_module(trial, "output")
    finally:
        trial.unlink(missing_ok=True)
    checkpoint_files.save(content, output)
    print(f"{output} takes its base model from {settings['model']} instead of {before}")
