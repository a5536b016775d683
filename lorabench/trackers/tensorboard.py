"""TensorBoard event files, one folder a run: `tensorboard --logdir sweeps/<name>/runs`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.overrides import flatten
from lorabench.config.settings import TrackerConfig
from lorabench.store.records import Record, Store, dump_json
from lorabench.trackers.contract import Row, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def build(settings: TrackerConfig, *, sweep: str, sweep_dir: Path) -> TensorBoardTracker:
    """Return a tracker that writes into the run directories. Raises `ImportError` without the tensorboard package."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as e:
        raise ImportError('tensorboard is not installed; it comes with: pip install "lorabench[tensorboard]"') from e
    return TensorBoardTracker(Store(sweep_dir))


class TensorBoardTracker(Tracker):
    """Writes scalars by step, the config as text, and at the end config and metrics for the HPARAMS tab."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writers: dict[str, SummaryWriter] = {}
        self.config: dict[str, dict[str, Any]] = {}

    def start(self, run_id: str, config: Mapping[str, Any], *, method: str, tags: list[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.store.run_dir(run_id) / "tensorboard"
        if unfinished := self.writers.pop(run_id, None):  # its pack starts again in this process
            unfinished.close()
        if folder.is_dir():
            shutil.rmtree(folder)
        self.writers[run_id] = writer = SummaryWriter(str(folder))
        self.config[run_id] = _hyperparameters({**config, "tags": ", ".join(tags)})
        writer.add_text("config", "\n".join("    " + line for line in dump_json(config).splitlines()), 0)

    def log(self, run_id: str, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writers[run_id].add_scalar(name, value, int(row["step"]))

    def finish(self, run_id: str, record: Record) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self.writers.pop(run_id)
        results = {f"final/{k}": float(v) for k, v in record.metrics.items() if isinstance(v, (int, float))}
        for summary in hparams(self.config.pop(run_id), results):
            writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        for name, value in results.items():
            writer.add_scalar(name, value, int(record.metrics.get("best_step") or 0))
        writer.close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys with plain values, as the HPARAMS tab takes them."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flatten(config) if value != {}}
