"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prlhf_lightning.training.checkpoint_entry import users_of

_TAG = "prlhf_lightning"
_SETTINGS = ("user_model", "policy", "loss", "alpha", "optim")


def is_card(path: Path) -> bool:
    """Return whether a file is a model card of this package, edited or not, by the tags at its head."""
    if not path.is_file():
        return False
    start, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    return not start and _TAG in rest.partition("\n---")[0]


def model_card(checkpoint: Path, content: Mapping[str, Any], adapters: bool, users: bool, vectors: bool) -> str:
    """Return the card's text.

    Args:
        checkpoint: The checkpoint's path.
        content: Its content.
        adapters: Whether the folder has adapters, not the merged model.
        users: Whether the folder has the users.
        vectors: Whether it has their soft prompts for other programs.
    """
    settings = content["hyper_parameters"]
    base = str(settings["policy"].get("init_args", {}).get("model", ""))
    is_hub_name = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    head = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["personalization", "preference-learning", _TAG],
        **({"base_model": base} if is_hub_name else {}),
    }
    number = len(users_of(content)) - 1
    loss = str(settings["loss"]["class_path"]).rpartition(".")[2]
    user_model = str(settings["user_model"]["class_path"]).rpartition(".")[2]
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"]),
        f"# A personalized `{base.rpartition('/')[2].removeprefix('builtin:')}`",
        f"`{base}`, trained with [prlhf_lightning] on who preferred which answer (arXiv:2402.05133): "
        f"{loss}, users as {user_model}. This folder holds "
        + ("LoRA adapters that refer to the base model." if adapters else "the whole language model."),
        _users(number, vectors) if users else "It holds no users: no ids, and none of their vectors.",
        "## Training\n\n" + _metrics(checkpoint, content),
        "```json\n" + json.dumps({key: settings.get(key) for key in _SETTINGS}, indent=2, default=str) + "\n```",
        "## License\n\nWhat is made from a model is subject to that model's license, and to the terms under which the "
        "feedback was given; this card grants nothing beyond them.",
    ]
    return "\n\n".join(parts) + "\n"


def _users(number: int, vectors: bool) -> str:
    about_vectors = (
        " `user_vectors.safetensors` has each one's soft prompt `[T, d]` by user id; the empty string "
        "is the generic user, for unknown users. The vectors go right after BOS, before the prompt."
    )
    return (
        f"## Users\n\n{number:,} users.{about_vectors if vectors else ''}\n\n"
        "```python\nfrom prlhf_lightning import GenerationRequest, Generator\n\n"
        'writer = Generator.from_folder("path/to/this/folder")\n'
        'print(writer.generate([GenerationRequest("...", user=writer.vocabulary.ids[0])])[0].text)\n```\n\n'
        "**Privacy.** `users.json` has the users' ids, and a vector says what a person likes: treat both as personal "
        "data. Give this folder to nobody whom the users have not agreed to; `export --include_users false` writes it "
        "without. What users' judgments taught the weights that all share is in any copy."
    )


def _metrics(checkpoint: Path, content: Mapping[str, Any]) -> str:
    lines = [f"Step {content.get('global_step', '?')}, from `{checkpoint.name}`."]
    for state in (content.get("callbacks") or {}).values():
        name, score = (state.get("monitor"), state.get("current_score")) if isinstance(state, dict) else (None, None)
        if name and score is not None:
            lines.append(f"`{name}`: {float(score):.4f}.")
    return " ".join(lines)
