"""What runs are called, and how they end."""

from __future__ import annotations

import re

RUN_ID = re.compile(r"[0-9a-f]{12}")  # the first digits of the SHA-256 of a run's identity
STATUSES = ("completed", "failed", "diverged", "pruned")
