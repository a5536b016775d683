"""Trackers mirror the records in other tools: W&B, TensorBoard, CSV. No tracker fails a run."""

from __future__ import annotations

import importlib
from pathlib import Path

from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Store
from lorabench.trackers.contract import Mirror, Tracker

__all__ = ["Mirror", "Tracker", "make_tracker"]


def make_tracker(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> Mirror | None:
    """Return the mirror that the settings ask for, or None for `tracker=none`.

    `settings.name` is a module of this package. It is imported, and its `build` called, when the first run starts.
    """
    if settings.name == "none":
        return None

    def build() -> Tracker:
        module = importlib.import_module(f"lorabench.trackers.{settings.name}")
        tracker: Tracker = module.build(settings, sweep=sweep, sweep_dir=sweep_dir)
        return tracker

    return Mirror(settings.name, build, Store(sweep_dir).history)
