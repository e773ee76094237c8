"""Where files that can be made again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$PRLHF_CACHE`, or `~/.cache/prlhf_lightning`."""
    return Path(os.environ.get("PRLHF_CACHE") or "~/.cache/prlhf_lightning").expanduser()
