"""Features of texts for linear heads: a shared part, a part for each known prompt, and one for each known text.

T texts, d the backbone's width, P known prompts, M known texts, D = d (1 + P) + M features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prlhf_lightning.rewards.pairs import JudgedPairs, TextTable

#: A prompt has a part of its own from this many training texts on; a text, from this many training users on.
_TEXTS_OF_PROMPT, _USERS_OF_TEXT = 8, 2
#: Most features of the prompts' parts, and most known texts.
_PROMPT_FEATURES, _KNOWN_TEXTS = 1 << 15, 1 << 15
#: Share of a head's prior variance in the weights of all prompts; each known prompt's own weights have the rest.
_SHARED = 0.3
#: Prior variance of a known text's own effect, in units of that of its features.
_OF_TEXT = 4.0


@dataclass(frozen=True)
class TextFeatures:
    """Features of T texts, stored by their parts.

    Attributes:
        vectors: `[T, d]` float32, of length 1.
        prompt: `[T]` int64 number of the text's prompt, from 1 on; 0 if it is not known.
        text: `[T]` int64 number of the text, from 1 on; 0 if it is not known.
        prompts: P.
        texts: M.
    """

    vectors: Tensor
    prompt: Tensor
    text: Tensor
    prompts: int
    texts: int

    @property
    def size(self) -> int:
        """Number of features, D."""
        return self.vectors.shape[1] * (1 + self.prompts) + self.texts

    @property
    def _scales(self) -> tuple[float, float]:
        shared = _SHARED if self.prompts else 1.0
        return shared**0.5, (1 - shared) ** 0.5

    def scores(self, weights: Tensor) -> Tensor:
        """Return the products of all features with weights `[D, K]`, `[T, K]`, without building the features."""
        width = self.vectors.shape[1]
        shared, own = self._scales
        scores = shared * (self.vectors @ weights[:width])
        for number in range(1, 1 + self.prompts):
            rows = (self.prompt == number).nonzero().flatten()
            scores = scores.index_add(0, rows, own * (self.vectors[rows] @ weights[number * width :][:width]))
        known = self.text.nonzero().flatten()
        effects = weights[len(weights) - self.texts :]
        return scores.index_add(0, known, _OF_TEXT**0.5 * effects[self.text[known] - 1])

    def dense(self, index: Tensor) -> Tensor:
        """Return the features of the texts `index` `[n]`, `[n, D]`."""
        width, count = self.vectors.shape[1], len(index)
        shared, own = self._scales
        vectors, rows = self.vectors[index], torch.arange(count, device=index.device)
        blocks = vectors.new_zeros(count, 1 + self.prompts, width)
        blocks[rows, self.prompt[index]] = own * vectors
        blocks[:, 0] = shared * vectors
        texts = vectors.new_zeros(count, 1 + self.texts)
        texts[rows, self.text[index]] = _OF_TEXT**0.5
        return torch.cat([blocks.flatten(1), texts[:, 1:]], dim=1)


class FeatureMap(nn.Module):
    """Maps a backbone's vectors of texts to features; fitted to the training texts, and not trained.

    A vector is centered on the mean of its prompt's training texts (of all training texts, for other prompts) and
    scaled to length 1. So a user's reward is 0 on average over texts, and rewards do not drift.

    A head on these features is a hierarchical model (Gelman and Hill 2006, §12): weights for all prompts, differences
    from them for a prompt with many answers, and an effect of each text that several users judged. Texts and prompts
    that are new get the shared part alone.
    """

    means: Tensor
    prompt_keys: Tensor
    text_keys: Tensor

    def __init__(self, width: int = 0, prompts: int = 0, texts: int = 0) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(1 + prompts, width))
        self.register_buffer("prompt_keys", torch.zeros(prompts, 16, dtype=torch.uint8))
        self.register_buffer("text_keys", torch.zeros(texts, 16, dtype=torch.uint8))

    @property
    def size(self) -> int:
        """Number of features, D."""
        return self.means.shape[1] * len(self.means) + len(self.text_keys)

    @classmethod
    def fit(cls, vectors: Tensor, pairs: JudgedPairs) -> FeatureMap:
        """Return the map for training pairs, whose texts have `vectors` `[T, d]`."""
        texts, width = pairs.texts, vectors.shape[1]
        judged = Counter(pairs.texts.prompt_keys)
        several = len(judged) > 1  # with one prompt, the shared part is the prompt's
        prompts = [key for key, count in judged.most_common(_PROMPT_FEATURES // width)]
        prompts = [key for key in prompts if several and judged[key] >= _TEXTS_OF_PROMPT]
        ids = [*zip(pairs.chosen.tolist(), pairs.user_ids, strict=True)]
        ids += zip(pairs.rejected.tolist(), pairs.user_ids, strict=True)
        users = Counter(text for text, _ in dict.fromkeys(ids))  # in an order that does not depend on hashes
        known = [texts.keys[t] for t, count in users.most_common(_KNOWN_TEXTS) if count >= _USERS_OF_TEXT]
        made = cls(width, len(prompts), len(known)).to(vectors.device)
        made.prompt_keys.copy_(_bytes(prompts))
        made.text_keys.copy_(_bytes(known))
        groups = made._numbers(made.prompt_keys, texts.prompt_keys).to(vectors.device)
        made.means[0] = vectors.mean(0)
        for number in range(1, 1 + len(prompts)):
            made.means[number] = vectors[groups == number].mean(0)
        return made

    def forward(self, vectors: Tensor, texts: TextTable) -> TextFeatures:
        """Return the features of texts with vectors `[T, d]`."""
        prompt, text = (
            self._numbers(known, keys).to(vectors.device)
            for known, keys in ((self.prompt_keys, texts.prompt_keys), (self.text_keys, texts.keys))
        )
        centered = nn.functional.normalize(vectors - self.means[prompt], dim=1)
        return TextFeatures(centered, prompt, text, len(self.prompt_keys), len(self.text_keys))

    @staticmethod
    def _numbers(known: Tensor, keys: Sequence[bytes]) -> Tensor:
        number = {row.tobytes(): place for place, row in enumerate(known.cpu().numpy(), start=1)}
        return torch.tensor([number.get(key, 0) for key in keys], dtype=torch.long)


def _bytes(keys: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16).copy())
