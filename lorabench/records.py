"""The store: one atomic `run.json` a run, an append-only history, a manifest a sweep. No torch.

<sweep dir>/sweep.json                       the manifest: cells, runs, pack plans (versions append)
<sweep dir>/runs/<run_id>/run.json           the record, written once, when the run has ended
<sweep dir>/runs/<run_id>/history.jsonl      rows {"step": int, "train/loss": ..., "val/accuracy": ...}
<sweep dir>/runs/<run_id>/test.npz           per-example test results (confirm role): example, loss, weight, ...
<sweep dir>/runs/<run_id>/adapter/           trained weights, PEFT's format where it has one
<sweep dir>/analysis/weights.json            what `lorabench.analyze` measured on those weights
<sweep dir>/analysis/costs.json              what `lorabench.costs` measured of keeping and serving them
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.schema import ExistingWork

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "sweep.json"
STATUSES = ("completed", "failed", "diverged", "pruned")
RUN_ID = re.compile(r"[0-9a-f]{12}")
OURS = {MANIFEST, "runs", "locks", "analysis", "README.md", ".gitkeep"}


@dataclass
class Record:
    """What a run that has ended leaves on disk."""

    run_id: str
    role: str
    status: str
    config: dict[str, Any]
    metrics: dict[str, Any] = field(
        default_factory=dict
    )  # {"val/loss": .., "test/accuracy": .., "primary": "accuracy"}
    resources: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    schema: int = 1

    def __post_init__(self) -> None:
        assert RUN_ID.fullmatch(self.run_id) and self.status in STATUSES


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    try:
        with open(tmp, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def dump_json(value: Any) -> str:
    """JSON with sorted keys; NaN and infinities become null, so that every reader can parse it."""
    return json.dumps(_finite(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


class Store:
    """A sweep directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the manifest against other launchers on this machine; the kernel frees it when its holder dies."""
        path = self.root / "locks" / "manifest"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def check_foreign(self) -> None:
        """Raise `ExistingWork` when the directory holds files that are not a sweep's."""
        if self.root.exists() and not self.root.is_dir():
            raise ExistingWork("sweep.dir", str(self.root), "a directory; this is a file")
        if not self.root.is_dir():
            return
        foreign = sorted(p.name for p in self.root.iterdir() if p.name not in OURS and not p.name.startswith("."))
        if foreign:
            names = ", ".join(foreign[:5])
            raise ExistingWork("sweep.dir", str(self.root), f"an empty or a sweep's directory; this one holds {names}")

    def run_dir(self, run_id: str) -> Path:
        assert RUN_ID.fullmatch(run_id), run_id
        return self.root / "runs" / run_id

    def write(self, record: Record) -> None:
        atomic_write(self.run_dir(record.run_id) / "run.json", dump_json(asdict(record)))

    def read(self, run_id: str) -> Record | None:
        """The record of a run that has ended, or None. A torn or foreign file counts as none."""
        try:
            data = json.loads((self.run_dir(run_id) / "run.json").read_text(encoding="utf-8"))
            return Record(**data)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (json.JSONDecodeError, TypeError, AssertionError, UnicodeDecodeError):
            return None

    def run_ids(self) -> list[str]:
        runs = self.root / "runs"
        if not runs.is_dir():
            return []
        return sorted(e.name for e in os.scandir(runs) if RUN_ID.fullmatch(e.name))

    def records(self) -> list[Record]:
        return [r for r in map(self.read, self.run_ids()) if r is not None]

    def append_history(self, run_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
        path = self.run_dir(run_id) / "history.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)

    def reset_history(self, run_id: str) -> None:
        """A pack that starts again starts its histories again."""
        (self.run_dir(run_id) / "history.jsonl").unlink(missing_ok=True)

    def history(self, run_id: str) -> list[dict[str, Any]]:
        try:
            lines = (self.run_dir(run_id) / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a torn last line
        return rows

    def write_arrays(self, run_id: str, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Per-example results as `<name>.npz`: [N] arrays, no pickles."""
        path = self.run_dir(run_id) / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{name}.tmp.npz")
        np.savez_compressed(tmp, **arrays)  # type: ignore[arg-type]
        os.replace(tmp, path)

    def arrays(self, run_id: str, name: str) -> dict[str, np.ndarray] | None:
        path = self.run_dir(run_id) / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}

    def manifest(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as e:
            raise ExistingWork("sweep.dir", str(self.root), f"its {MANIFEST} is not valid JSON ({e})") from e
        if not isinstance(data, dict) or data.get("schema") != 1:
            raise ExistingWork("sweep.dir", str(self.root), f"its {MANIFEST} is not a lorabench manifest of schema 1")
        return data

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        atomic_write(self.root / MANIFEST, dump_json(manifest))


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, nested keys dotted: `config.method.r`, `metrics.val/loss`, `resources.train_seconds`."""
    import pandas as pd  # half a second: only reports need it

    rows = []
    for r in records:
        row: dict[str, Any] = {"run_id": r.run_id, "role": r.role, "status": r.status, "error": r.error}
        for part in ("config", "metrics", "resources", "provenance"):
            row.update(_flatten(getattr(r, part), part))
        rows.append(row)
    return pd.DataFrame(rows)


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out.update(_flatten(inner, f"{prefix}.{key}"))
    return out
