"""Where what is made once is kept for all runs of a machine. Everything in it can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """LORABENCH_CACHE, or lorabench in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("LORABENCH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lorabench")
