"""`export` of a reward model: heads and map of features as safetensors, which need no other package than torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from prlhf_lightning.cli.models import reward_model_of
from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.data.tokenization import prefix_ids
from prlhf_lightning.inference.folder import USERS
from prlhf_lightning.rewards import RewardModel, TextFeatures
from prlhf_lightning.training import PersonalizedRewardModel
from prlhf_lightning.user_models import ClusterUserModel, LowRankUserModel
from prlhf_lightning.utils.hashing import SETTINGS, with_checksums
from prlhf_lightning.utils.io import atomic_write_bytes, whole_folder

_REWARDS, _SHARES = "reward.safetensors", "users.safetensors"


def export_reward_model(
    content: Mapping[str, Any], checkpoint: Path, output: Path, include_users: bool, trust_classes: list[str] | None
) -> None:
    """Write a reward model as a folder; the frozen backbone is named, not copied.

    Args:
        content: Content of the checkpoint.
        checkpoint: Its path.
        output: The folder to write.
        include_users: Write the users; without them, the folder holds the generic user alone.
        trust_classes: Classes outside this package that the checkpoint may name.
    """
    model = reward_model_of(content, checkpoint, "model", trust_classes)
    tensors, shares = folded(model)
    users = model.vocabulary if include_users and model.vocabulary is not None else UserVocabulary([])
    with whole_folder(output, [_REWARDS, _SHARES, USERS, SETTINGS, "README.md"], last=SETTINGS) as folder:
        atomic_write_bytes(folder / _REWARDS, safetensors_bytes(tensors))
        atomic_write_bytes(folder / _SHARES, safetensors_bytes({"shares": shares[: len(users)].contiguous()}))
        atomic_write_bytes(folder / USERS, _json({"format": 1, "users": list(users.ids)}))
        atomic_write_bytes(folder / "README.md", _card(model, len(users) - 1).encode())
        atomic_write_bytes(folder / SETTINGS, _json(with_checksums(folder, _settings(model))))
    rank_zero_info(f"The reward model is in {output}")


@torch.no_grad()
def folded(model: RewardModel) -> tuple[dict[str, Tensor], Tensor]:
    """Return a reward model as tensors, with the scales of features in the weights.

    The reward of text t of prompt p for user u is `shares[u] @ (weights[p] @ v + effects[t])`, where `v` is the
    backbone's vector minus `means[p]`, of length 1.

    Returns:
        `means [1 + P, d]`, `weights [1 + P, K, d]`, `effects [1 + M, K]` (row 0 of each is of unknown prompts and
        texts), `prompt_keys [P, 16]` and `text_keys [M, 16]`; and the users' shares `[1 + U, K]`.
    """
    directions, shares = _factors(model)
    features = model.features
    prompts, texts, width = len(features.prompt_keys), len(features.text_keys), features.means.shape[1]

    def scores(vectors: Tensor, prompt: int, text: Tensor) -> Tensor:
        of_prompt = torch.full_like(text, prompt)
        return TextFeatures(vectors, of_prompt, text, prompts, texts).scores(directions.T)

    # The scores of unit vectors are the weights, in whatever way features are scaled; those of null vectors, effects.
    unit, known = torch.eye(width, device=directions.device), torch.arange(1 + texts, device=directions.device)
    no_text = torch.zeros(width, dtype=torch.long, device=directions.device)
    weights = torch.stack([scores(unit, prompt, no_text).T for prompt in range(1 + prompts)])
    effects = scores(unit.new_zeros(1 + texts, width), 0, known)
    tensors = {"means": features.means, "weights": weights, "effects": effects}
    keys = {"prompt_keys": features.prompt_keys, "text_keys": features.text_keys}
    return {name: tensor.cpu().contiguous() for name, tensor in (tensors | keys).items()}, shares.cpu()


def _factors(model: RewardModel) -> tuple[Tensor, Tensor]:
    """Return directions `[K, D]` and users' shares of them `[1 + U, K]`, whose products are the heads."""
    users = model.user_model
    if isinstance(users, LowRankUserModel):
        codes = users.codes.weight
        return torch.cat([users.generic_prompt, users.basis]), torch.cat([torch.ones_like(codes[:, :1]), codes], dim=1)
    if isinstance(users, ClusterUserModel):
        return users.prompts[:, 0], users.weights.weight.softmax(-1)
    rows = torch.arange(len(model.vocabulary) if model.vocabulary is not None else 1)
    rows = rows.to(model.features.means.device)
    if not users.personalizes:
        return model.heads(rows[:1]), model.features.means.new_ones(len(rows), 1)
    return model.heads(rows), torch.eye(len(rows), device=rows.device)


def _settings(model: PersonalizedRewardModel) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "format": 1,
        "kind": "reward model",
        "backbone": backbone.name,
        "revision": backbone.revision,
        "backbone_weights": backbone.identity()["weights"],
        "pooling": backbone.pooling,
        "prefix_ids": prefix_ids(backbone.tokenizer),
        "end_id": backbone.tokenizer.eos_token_id,
        "tokenization": asdict(model.tokenization),
    }


def _card(model: PersonalizedRewardModel, users: int) -> str:
    return (
        '---\ntags: ["personalization", "reward-model", "prlhf_lightning"]\n---\n\n'
        f"# A personalized reward model\n\nHeads on features of the frozen backbone `{model.backbone.name}`, for "
        f"{users:,} users and the generic user: {type(model.user_model).__name__}, trained with [prlhf_lightning]. "
        "docs/reward_models.md has the lines that read it with torch and transformers.\n\n"
        "**Privacy.** `users.json` has the users' ids, and their shares say what a person likes: treat both as "
        "personal data. `export --include_users false` writes neither.\n"
    )


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
