"""A run that has ended, read back from its directory: record, settings, trained weights and their base.

Torch is imported when weights are read, not before, so that commands answer `--help` at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.components import trust_files
from lorabench.config.contracts.model import Base, HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, digest
from lorabench.runtime.terminal import say
from lorabench.store import validation
from lorabench.store.records import Record, pop_checksum

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.config.contracts.method import SlicePlan

RUN_DIRECTORY = "a run's directory, <sweep>/runs/<run_id>"


@dataclass(frozen=True)
class SavedRun:
    """A run with trained weights."""

    path: Path
    record: Record
    run: RunConfig
    head: HeadSpec

    @property
    def folder(self) -> Path:
        """The folder of its weights; the earlier weights where a writer was killed between two renames."""
        folder = self.path / "adapter"
        return folder if folder.is_dir() else self.path / ".adapter.old"

    @cached_property
    def checksum(self) -> str:
        """A prefix of the SHA-256 over names and content of the weights' files."""
        total = hashlib.sha256()
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            with open(path, "rb") as f:
                total.update(f"{path.name}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\0".encode())
        return total.hexdigest()[:16]

    @cached_property
    def base_key(self) -> str:
        """A key that is equal where two runs trained on the same base under the same head."""
        fingerprint = self.record.provenance.get("model_fingerprint")
        return digest([dataclasses.asdict(self.run.model), dataclasses.asdict(self.head), fingerprint])

    def weights(self) -> tuple[dict[str, Tensor], SlicePlan]:
        """Return what the run trained. Raises `ConfigError` for torn or foreign files."""
        from lorabench.adapters.files import load_slice

        return load_slice(self.path / "adapter")

    def base(self, *, dtype: str, dropout: bool = True) -> Base:
        """Return the base it was trained on, in `dtype`. dropout: as the run set it; False: the base's own.

        Raises `ConfigError` where the base's files are gone or are no longer the ones it was trained on.
        """
        model = self.run.model
        if not dropout and model.dropout is not None:
            model = model.replace(dropout=None)
        base: Base = model.load(self.head, dtype=dtype, attention=self.record.provenance.get("attention", "eager"))
        trained_on = self.record.provenance.get("model_fingerprint")
        if trained_on and base.fingerprint != trained_on:
            source = model.source or model.kind
            raise ConfigError(
                "model.source", source, f"the files this run was trained on; these differ (run {self.record.run_id})"
            )
        return base

    @property
    def label(self) -> str:
        """The method in a few words."""
        told = self.run.method.label()
        r = f", r = {told['r']}" if told.get("r") else ""
        return f"{told['method']}{r}"


def open_run(path: str | Path, *, trust: bool = False) -> SavedRun:
    """Return the run behind a directory. Raises `ConfigError` for anything that is not a run with trained weights.

    trust: whether Python files that its record names may run; False raises `UntrustedFile` for one that names any.
    """
    path = Path(path)
    record = _record(path)
    if record.status == "failed":
        raise ConfigError(
            "run",
            str(path),
            f"a run that trained; this one failed: {(record.error or 'no reason given').splitlines()[0]}",
        )
    if not (path / "adapter").is_dir() and not (path / ".adapter.old").is_dir():
        why = "it diverged" if record.status == "diverged" else "trainer.save_weights was false, or they were deleted"
        raise ConfigError("run", str(path), f"a run with weights (adapter/); this one has none: {why}")
    told = record.provenance.get("head") or {}
    if "auto_class" not in told:
        raise ConfigError("run", str(path), "a record that names its head (provenance.head)")
    head = HeadSpec(told["auto_class"], tuple(told.get("label_names", ())))
    with trust_files(trust):
        run = RunConfig.from_dict(record.config)
    return SavedRun(path, record, run, head)


def _record(path: Path) -> Record:
    if not path.is_dir():
        raise ConfigError("run", str(path), f"{RUN_DIRECTORY}; there is no such directory")
    if (path / "sweep.json").is_file() or (path / "runs").is_dir():
        raise ConfigError("run", str(path), f"{RUN_DIRECTORY}; this is a whole sweep")
    try:
        data = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if wrong := validation.first_error(validation.RECORD, data):
            raise ConfigError("run", str(path / "run.json"), f"a record of this version, whole (at {wrong})")
        if pop_checksum(data):
            say(
                f"{path / 'run.json'}: edited since it was written; what it says may not be what was measured",
                error=True,
            )
        return Record(**data)
    except FileNotFoundError as e:
        raise ConfigError("run", str(path), f"{RUN_DIRECTORY}; it holds no run.json") from e
    except ConfigError:
        raise
    except (ValueError, TypeError, AssertionError, OSError, RecursionError) as e:
        raise ConfigError("run", str(path / "run.json"), f"a record of this version, whole ({type(e).__name__})") from e


def metric_rows(record: Record) -> list[tuple[str, Any]]:
    """Return the metrics a reader wants to see, test before validation."""
    numbers = [
        (name, value) for name, value in record.metrics.items() if "/" in name and isinstance(value, (int, float))
    ]
    return sorted(numbers, key=lambda item: (not item[0].startswith("test/"), item[0]))
