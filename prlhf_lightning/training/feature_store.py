"""On-disk store of a frozen backbone's vectors of texts, so that each text is embedded once, ever."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.rewards import RewardBackbone, TextTable
from prlhf_lightning.training.reference_cache import ReferenceCache
from prlhf_lightning.utils.cache_dir import default_cache_dir
from prlhf_lightning.utils.progress import tracked

_AT_ONCE = 256  # texts between two writes


class FeatureStore:
    """Vectors by the content of their texts, in a cache of the backbone's own.

    Args:
        cache: The cache on disk.
    """

    def __init__(self, cache: ReferenceCache) -> None:
        self._cache = cache

    def vectors(self, texts: TextTable, backbone: RewardBackbone) -> Tensor:
        """Return the vectors `[T, d]` of texts; the backbone computes those that are not stored."""
        rows = self._cache.get(texts.keys)
        missing = [row for row, found in enumerate(rows) if found is None]
        parts = [missing[start : start + _AT_ONCE] for start in range(0, len(missing), _AT_ONCE)]
        for part in tracked(parts, "Embedding texts") if parts else ():
            vectors = backbone([texts.prompts[row] for row in part], [texts.completions[row] for row in part])
            keys, values = [texts.keys[row] for row in part], [*vectors.cpu().numpy()]
            self._cache.put(keys, values)
            for row, value in zip(part, values, strict=True):
                rows[row] = value
        self._cache.flush()
        found = [row for row in rows if row is not None]
        device = next(backbone.model.parameters()).device
        return torch.from_numpy(np.stack(found)).to(device) if found else torch.zeros(0, backbone.width, device=device)


def open_feature_store(backbone: RewardBackbone) -> FeatureStore | None:
    """Return the store of a backbone that has been built, or None, with a warning, if its folder is not writable."""
    try:
        return FeatureStore(ReferenceCache(default_cache_dir() / "features", backbone.identity(), "feature cache"))
    except ConfigurationError as error:
        rank_zero_warn(f"{error} Texts are embedded again in each run.")
        return None
