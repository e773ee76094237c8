"""The reference policy's log-probs, kept on disk."""

from prlhf_lightning.reference_cache.cache import ReferenceCache, content_key
from prlhf_lightning.reference_cache.segments import Values
from prlhf_lightning.reference_cache.weights import weights_digest

__all__ = ["ReferenceCache", "Values", "content_key", "weights_digest"]
