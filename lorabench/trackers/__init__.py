"""Mirrors of the records: W&B, TensorBoard, CSV. Never the truth, never a reason for a run to fail."""

from __future__ import annotations

import importlib
from pathlib import Path

from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Store
from lorabench.trackers.contract import Mirror, Tracker

__all__ = ["Mirror", "Tracker", "make_tracker"]


def make_tracker(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> Mirror | None:
    """The mirror a config asks for, safe to call from training; None for `none`.

    `tracker.name` is the module here whose `build` makes it; nothing of it is imported before the first run starts.
    """
    if settings.name == "none":
        return None

    def build() -> Tracker:
        module = importlib.import_module(f"lorabench.trackers.{settings.name}")
        tracker: Tracker = module.build(settings, sweep=sweep, sweep_dir=sweep_dir)
        return tracker

    return Mirror(settings.name, build, Store(sweep_dir).history)
