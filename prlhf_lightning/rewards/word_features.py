"""Features of texts by the words in them, which need no pretrained model: latent semantic ones, and the length.

M texts, S tokens in all of them, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BUCKETS = 1 << 16  # of hashed n-grams
_NGRAMS = (1, 2)
_LENGTH = 0.3  # scale of the length, between that of one latent feature (0.1) and of all (1)
_OVERSAMPLING, _POWER_ITERATIONS = 10, 2  # of the randomized SVD (Halko et al. 2011)
_AT_ONCE = 1 << 18  # cells of the matrix of n-grams


@dataclass(frozen=True)
class WordFeatures:
    """Maps texts to features: by the counts of their tokens and pairs of tokens, and by their length.

    The square roots of the counts are weighted by inverse document frequency, and scaled to one unit vector per text
    (latent semantic analysis, Deerwester et al. 1990). Features are their products with the main directions of such
    vectors, and 0.3 times the standardized logarithm of the length.

    Attributes:
        importance: `[B]` float32 weight of each bucket of n-grams.
        directions: `[B, D - 1]` float32 main directions, scaled so that features have a mean square norm of 1.
        length: Mean and standard deviation of the logarithm of the length.
    """

    importance: Tensor
    directions: Tensor
    length: tuple[float, float]

    @classmethod
    @torch.no_grad()
    def fit(cls, ids: Tensor, lengths: Tensor, size: int = 128) -> WordFeatures:
        """Return the map of texts like these, `D = min(size, M) + 1`, by a randomized SVD (Halko et al. 2011).

        Args:
            ids: `[S]` int64 token ids of all texts, one after the other.
            lengths: `[M]` int64 number of tokens of each text.
            size: Most latent features.
        """
        rows, columns, counts = _counted(ids, lengths)
        frequency = torch.bincount(columns, minlength=_BUCKETS) / max(len(lengths), 1)
        importance = (1 / frequency.clamp(min=1e-3)).log().clamp(min=0.05)
        counted = _Counts.of(rows, columns, counts, importance, len(lengths))
        sketch = torch.randn(_BUCKETS, size + _OVERSAMPLING, generator=torch.Generator().manual_seed(0))
        for _ in range(_POWER_ITERATIONS):
            sketch = counted.transposed_times(torch.linalg.qr(counted.times(sketch))[0])
        span = torch.linalg.qr(counted.times(sketch))[0]
        directions = torch.linalg.svd(counted.transposed_times(span), full_matrices=False)[0]
        directions = directions[:, : min(size, len(lengths))].contiguous()
        norm = counted.times(directions).square().sum(1).mean().sqrt().clamp(min=1e-6)
        logs = lengths.float().log1p()
        spread = float(logs.std(correction=0).clamp(min=1e-6))
        return cls(importance, directions / norm, (float(logs.mean()), spread))

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the features of texts, `[M, D]` float32; see `fit`."""
        counted = _Counts.of(*_counted(ids, lengths), self.importance, len(lengths))
        mean, spread = self.length
        length = _LENGTH * (lengths.float().log1p() - mean) / spread
        return torch.cat([counted.times(self.directions), length[:, None]], dim=1)


@dataclass(frozen=True)
class _Counts:
    """The sparse matrix of texts and n-grams, `[M, B]`, whose rows have length 1."""

    rows: Tensor
    columns: Tensor
    weights: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, counts: Tensor, importance: Tensor, texts: int) -> _Counts:
        weights = counts.sqrt() * importance[columns]
        norms = torch.zeros(texts).index_add_(0, rows, weights.square()).sqrt()
        starts = F.pad(torch.bincount(rows, minlength=texts).cumsum(0), (1, 0))[:-1]
        return cls(rows, columns, weights / norms[rows], starts)

    def times(self, matrix: Tensor) -> Tensor:
        """Return the product with `[B, n]`, `[M, n]`."""
        return F.embedding_bag(self.columns, matrix, self.starts, mode="sum", per_sample_weights=self.weights)

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Return the product of the transpose with `[M, n]`, `[B, n]`; in blocks: it makes a row for each cell."""
        result = torch.zeros(_BUCKETS, matrix.shape[1])
        for some in torch.split(torch.arange(len(self.rows)), _AT_ONCE):
            result.index_add_(0, self.columns[some], self.weights[some, None] * matrix[self.rows[some]])
        return result


def _counted(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the text, the bucket and the count of each n-gram that stands in a text, sorted by text."""
    text_of, hashed = _ngrams(ids, lengths)
    cells, counts = torch.unique(text_of * _BUCKETS + hashed, return_counts=True)
    return cells // _BUCKETS, cells % _BUCKETS, counts


def _ngrams(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the text and the hash of each n-gram."""
    text_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    texts, hashes = [], []
    running = torch.zeros_like(ids)
    for size in range(1, max(_NGRAMS) + 1):
        # The hash of the n-gram that starts at each token; it must not reach into the next text.
        running = running[: len(ids) - size + 1] * 1_000_003 + ids[size - 1 :] + 1
        running = running % 2_147_483_647
        inside = text_of[: len(running)] == text_of[size - 1 :]
        if size in _NGRAMS:
            texts.append(text_of[: len(running)][inside])
            hashes.append((running[inside] * 2_654_435_761 % 2_147_483_647) % _BUCKETS)
    return torch.cat(texts), torch.cat(hashes)
