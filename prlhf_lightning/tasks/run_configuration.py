"""The configuration of a checkpoint's run, for commands that measure the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prlhf_lightning.checkpoint_files import checkpoint_of
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.tasks.last_checkpoint import last_checkpoint

_COMMANDS = {"validate", "test", "predict"}


def with_configuration_of_run(words: Sequence[str], runs: str) -> list[str]:
    """Return the words of a command with the `config.yaml` of the checkpoint's run, where they configure no model.

    Args:
        words: The words, such as `validate --ckpt_path runs/version_0/checkpoints/last.ckpt`.
        runs: The folder of runs, where `--trainer.default_root_dir` does not name another.

    Raises:
        ConfigurationError: There is no such file, so that it must be named.
    """
    given = dict(_options(words))
    configures = any(name in ("-c", "--config") or name.startswith("--model") for name in given)
    path = given.get("--ckpt_path")
    if not words or words[0] not in _COMMANDS or not path or configures or {"-h", "--help"} & set(words):
        return list(words)
    checkpoint = Path(path)
    if path == "last":
        root = given.get("--trainer.default_root_dir", runs)
        newest = last_checkpoint(root)
        if newest is None:
            raise ConfigurationError(f"ckpt_path: there is no checkpoint of any run in {root}; name one by its path.")
        checkpoint = newest
    checkpoint = checkpoint_of(checkpoint, "ckpt_path")
    if not checkpoint.exists():
        raise ConfigurationError(
            f"ckpt_path: there is no checkpoint {checkpoint}; give a .ckpt file of an earlier run."
        )
    places = [folder / "config.yaml" for folder in (checkpoint.parent.parent, checkpoint.parent)]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise ConfigurationError(
            f"config: there is no {places[0]}, as `fit` writes it; name the configuration of the run with --config."
        )
    return [words[0], f"--config={config}", *words[1:]]


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names and values of options."""
    found = []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            after = words[number + 1] if number + 1 < len(words) else ""
            found.append((name, value if equals else after))
    return found
