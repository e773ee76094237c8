"""The command `relocate`: a checkpoint with a new path of its base model."""

from __future__ import annotations

from pathlib import Path

from transformers import __version__

from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.models import load_module, reward_model_of
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training import checkpoint_files
from prlhf_lightning.training.checkpoint_entry import entry_of, is_reward_model
from prlhf_lightning.utils.finite import check_finite
from prlhf_lightning.utils.io import check_output


def relocate(
    model: Path,
    base: str,
    output: Path,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Write a copy of a checkpoint with a new path of its base model, which a checkpoint does not hold.

    For checkpoints from another machine, or moved base models. It must be the same model: other weights are refused.

    Args:
        model: A checkpoint of `fit`, or the folder of its run.
        base: Folder or hub name of the base model.
        output: The checkpoint to write.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    check_output(output, "output")
    checkpoint = checkpoint_files.checkpoint_of(model)
    content = read_checkpoint(checkpoint, "model")
    if not content:
        raise ConfigurationError(
            f"model: {checkpoint} is a folder; give a .ckpt file of `fit`. In a folder with exported adapters, "
            "write the base model's path into base_model_name_or_path of adapter_config.json."
        )
    part = "backbone" if is_reward_model(content) else "policy"
    settings = content.get("hyper_parameters", {}).get(part, {}).get("init_args", {})
    if "model" not in settings:
        raise ConfigurationError(f"model: {checkpoint} names no base model, as checkpoints of CausalLMPolicy do.")
    check_finite(content, f"model: {checkpoint}")
    before = settings["model"]
    settings["model"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    trial = output.with_name(f"{output.name}.trial")
    try:  # before it replaces a file, which may be the checkpoint itself
        checkpoint_files.save(content, trial)
        if part == "backbone":  # which refuses other weights by itself
            reward_model_of(content, output, "base", trust_classes)
            trained_on = now = None
        else:
            module = load_module(trial, "output", trust_remote_code, trust_classes)
            trained_on, now = entry_of(content).get("base"), module.policy.base_identity()
    finally:
        trial.unlink(missing_ok=True)
    # Another version of transformers may have other names for the same weights: `load_module` has warned.
    if trained_on and now and trained_on["weights"] != now["weights"] and trained_on["transformers"] == __version__:
        raise ConfigurationError(
            f"base: the weights of {base} are not those of {before}, which {checkpoint} was trained on; trained "
            "weights fit no other model. Give the same model."
        )
    checkpoint_files.save(content, output)
    print(f"{output} loads its base model from {settings['model']} instead of {before}")
