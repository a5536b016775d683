"""The sweep's directory: one atomic `run.json` a run, an append-only history, a manifest a sweep. No torch.

<sweep dir>/sweep.json                       the manifest: cells, runs, pack plans (versions append) <sweep
dir>/runs/<run_id>/run.json           the record, written once, when the run has ended <sweep
dir>/runs/<run_id>/history.jsonl      rows {"step": int, "train/loss": ..., "val/accuracy": ...} <sweep
dir>/runs/<run_id>/test.npz           per-example test results (confirm role): example, loss, weight, ... <sweep
dir>/runs/<run_id>/samples.json       text tasks (confirm role): at most 8 of {"prompt" or "text", "expected", "before",
"after"} <sweep dir>/runs/<run_id>/adapter/           trained weights, PEFT's format where it has one <sweep
dir>/checkpoints/<pack id>/           where packs in training stand; see `checkpoints` <sweep dir>/shared.npz
in a copy of `lorabench.slim`: columns that several test.npz have in common <sweep dir>/optuna/journal
a study's trials, where Optuna chose them <sweep dir>/analysis/weights.json            what `lorabench.analyze` measured
on those weights <sweep dir>/locks/                           leases: who trains which pack now, who writes the manifest
<sweep dir>/analysis/costs.json              what `lorabench.costs` measured of keeping and serving them
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.config.errors import ExistingWork, Unwritable
from lorabench.runtime.files import atomic_write, name_unwritable
from lorabench.runtime.leases import SILENT_SECONDS, Holder, Lease, Leases, check_held, refuse_link
from lorabench.store.arrays import SHARED_FILE, pack_columns, read_columns
from lorabench.store.identifiers import RUN_ID, STATUSES

MANIFEST, HISTORY = "sweep.json", "history.jsonl"
MANIFEST_WAY_OUT = "moved away, it is made anew and finished runs are kept"
MAX_HISTORY_ROWS = 20_000  # of a run that are held at once
MIN_ROW_BYTES = 8  # of a row, `{"step"` and more
APPEND_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
OWN_NAMES = {
    MANIFEST,
    "runs",
    "locks",
    "checkpoints",
    "analysis",
    "optuna",
    SHARED_FILE,
    "README.md",
    ".gitkeep",
}


@dataclass
class Record:
    """What a run that has ended leaves on disk as `run.json`.

    metrics: numbers by name, such as `val/loss` and `test/accuracy`, and beside them `primary`, the name of the metric
    that counts. docs/formats.md has all fields.
    """

    run_id: str
    role: str
    status: str
    config: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    schema: int = 1

    def __post_init__(self) -> None:
        assert RUN_ID.fullmatch(self.run_id) and self.status in STATUSES


CHECKSUM = "record_sha256"  # under `provenance` in run.json alone: whether the file is as it was written
_FIELDS = {f.name for f in fields(Record)}


def dump_json(value: Any, *, indent: int | None = 1) -> str:
    """Return JSON with sorted keys. NaN and infinities become null, so that every reader can parse it.

    indent: None writes no blanks, for long tables.
    """
    how: dict[str, Any] = {"indent": indent} if indent else {"separators": (",", ":")}
    return json.dumps(_finite(value), sort_keys=True, ensure_ascii=False, allow_nan=False, **how) + "\n"


def record_text(record: Mapping[str, Any]) -> str:
    """Return the text of a `run.json`, with the checksum by which an edit by hand is noticed."""
    plain = json.loads(dump_json({**record, "provenance": _without_checksum(record.get("provenance") or {})}))
    plain["provenance"][CHECKSUM] = _checksum(plain)
    return dump_json(plain)


def pop_checksum(record: dict[str, Any]) -> bool:
    """Take the checksum out of a record's JSON, and return whether the record was edited since it was written.

    Records of older versions have no checksum and count as unedited.
    """
    provenance = record.get("provenance") or {}
    if CHECKSUM not in provenance:
        return False
    record["provenance"] = _without_checksum(provenance)
    return _checksum(record) != provenance[CHECKSUM]


def _checksum(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_checksum(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key != CHECKSUM}


def is_history_row(value: Any) -> bool:
    """Whether a value is a row of a history: a mapping with a whole `step`, all else a finite number, a text or
    null."""
    if not isinstance(value, dict) or not isinstance(value.get("step"), int) or not 0 <= value["step"] < 2**63:
        return False
    numbers = [x for x in value.values() if x is not None and not isinstance(x, str)]
    return all(isinstance(x, (int, float)) and abs(x) < 1e308 for x in numbers)


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


def thin_rows(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return all rows where they are at most `most`, else every 2nd, 4th, ... of them, and at most that many.

    Rows of a training step and those that hold more (an evaluation) are thinned apart, so that the rarer ones stay.
    """
    kept: dict[bool, list[tuple[int, dict[str, Any]]]] = {False: [], True: []}
    every, seen, total = {False: 1, True: 1}, {False: 0, True: 0}, 0
    for row in rows:
        rare = isinstance(row, dict) and any(key not in ("step", "lr") and key[:6] != "train/" for key in row)
        if seen[rare] % every[rare] == 0:
            kept[rare].append((total, row))
        seen[rare], total = seen[rare] + 1, total + 1
        if len(kept[False]) + len(kept[True]) > most:
            longer = len(kept[True]) > len(kept[False])
            kept[longer], every[longer] = kept[longer][::2], 2 * every[longer]
    return [row for _, row in sorted(kept[False] + kept[True], key=lambda numbered: numbered[0])]


class Store:
    """A sweep's directory.

    lease: the file of the lease (`Lease.file`) under which runs are written. Once that is another's, writing raises
    `LeaseLost`. None: runs are written without one.
    """

    def __init__(self, root: str | Path, lease: str | Path | None = None) -> None:
        self.root, self.lease = Path(root), Path(lease) if lease else None
        self.leases = Leases(self.root / "locks")
        self.edited: set[str] = set()  # runs whose record was read and is not as it was written

    def under(self, lease: Lease) -> Store:
        """Return this store for the holder of a lease: once the lease is another's, writing raises `LeaseLost`."""
        return Store(self.root, lease.file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the manifest against other launchers in the block. Raises `ExistingWork` where it may not be written."""
        try:
            with name_unwritable(self.root):
                lease = self.leases.wait(MANIFEST, self._tell_who)
        except Unwritable as e:
            if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise ExistingWork("sweep.dir", str(self.root), f"a directory that can be written ({e.strerror})") from e
        with lease:
            for torn in self.root.glob(f".{MANIFEST}.*.tmp"):  # of a process that was killed while it wrote
                torn.unlink(missing_ok=True)
            yield

    def _tell_who(self, holder: Holder) -> None:
        from lorabench.runtime.terminal import say

        way_out = f"end that process, or wait; a dead one is passed over after {SILENT_SECONDS:.0f} s"
        say(f"{self.root}: waits for {holder}, which writes {MANIFEST} ({way_out})", error=True)

    def check_foreign(self) -> None:
        """Raise `ExistingWork` for a directory that is no sweep's and holds something, or that leads elsewhere.

        What stands beside a manifest, such as notes, logs and a report, is a user's own: it is never touched.
        """
        for path in (self.root, *(self.root / name for name in sorted(OWN_NAMES))):
            refuse_link(path, "sweep.dir")
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ExistingWork("sweep.dir", str(self.root), "a directory; this is a file")
        if (self.root / MANIFEST).is_file():
            return
        foreign = sorted(p.name for p in self.root.iterdir() if p.name not in OWN_NAMES and not p.name.startswith("."))
        if foreign:
            allowed = f"an empty or a sweep's directory; this one has no {MANIFEST}, and holds {', '.join(foreign[:5])}"
            raise ExistingWork("sweep.dir", str(self.root), allowed)

    def run_dir(self, run_id: str) -> Path:
        """The folder of a run, whether it is there or not."""
        assert RUN_ID.fullmatch(run_id), run_id
        return self.root / "runs" / run_id

    def make_run_dir(self, run_id: str) -> Path:
        """Make a run's folder and return it. Raises `LeaseLost`, and `ExistingWork` for a symbolic link."""
        check_held(self.lease)
        path = self.run_dir(run_id)
        refuse_link(path, "sweep.dir")
        with name_unwritable(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, record: Record) -> None:
        """Write a run's record, after all that its history holds is on disk."""
        self.sync_history(record.run_id)
        atomic_write(self.make_run_dir(record.run_id) / "run.json", record_text(asdict(record)))

    def read(self, run_id: str) -> Record | None:
        """Return the record of a run that has ended, or None.

        A torn file, one of another run and one of another version count as none. One that was edited since it was
        written counts, and its run is noted in `edited`. A sweep that would train such a run
        refuses one of another version (`integrity.damaged_files`).
        """
        path = self.run_dir(run_id) / "run.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):  # ValueError: bad JSON, bad UTF-8, a number of too many digits
            return None
        except IsADirectoryError as e:
            raise ExistingWork("sweep.dir", str(path), "a record; this is a directory") from e
        from lorabench.store import validation  # pydantic takes a tenth of a second: only who reads records pays it

        if validation.first_error(validation.RECORD, data) or data["run_id"] != run_id or set(data) - _FIELDS:
            return None
        (self.edited.add if pop_checksum(data) else self.edited.discard)(run_id)
        return Record(**data)

    def stamp(self, run_id: str) -> tuple[int, int] | None:
        """Return a value that changes whenever a run's record is written anew; None where there is none."""
        try:
            about = (self.run_dir(run_id) / "run.json").stat()
        except OSError:
            return None
        return about.st_mtime_ns, about.st_ino

    def run_ids(self) -> list[str]:
        """The runs that have a folder, sorted; a run's folder is made as its training begins."""
        runs = self.root / "runs"
        if not runs.is_dir():
            return []
        return sorted(e.name for e in os.scandir(runs) if RUN_ID.fullmatch(e.name))

    def records(self) -> list[Record]:
        """All records that can be read, by run_id."""
        return [r for r in map(self.read, self.run_ids()) if r is not None]

    def append_history(self, run_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a run's history. Raises `LeaseLost` and `Unwritable`."""
        path = self.make_run_dir(run_id) / HISTORY
        text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        with name_unwritable(path), open(os.open(path, APPEND_FLAGS, 0o666), "w", encoding="utf-8") as f:
            f.write(text)

    def reset_history(self, run_id: str) -> None:
        """Remove a run's history and what killed writers left beside it: its pack starts again."""
        path = self.make_run_dir(run_id)
        with name_unwritable(path):
            for stale in (path / HISTORY, *path.glob(".*.tmp")):  # torn by a kill
                if not stale.is_dir():
                    stale.unlink(missing_ok=True)

    def history_size(self, run_id: str) -> int:
        """Bytes of a run's history; 0 where there is none."""
        path = self.run_dir(run_id) / HISTORY
        return path.stat().st_size if path.exists() else 0

    def sync_history(self, run_id: str) -> int:
        """Put a run's history on disk, and return its bytes."""
        try:
            with open(self.run_dir(run_id) / HISTORY, "rb") as f:
                os.fsync(f.fileno())
                return os.fstat(f.fileno()).st_size
        except FileNotFoundError:
            return 0

    def cut_history(self, run_id: str, size: int) -> None:
        """Drop the rows after the first `size` bytes: they lie beyond the checkpoint that a pack goes on from."""
        if size:
            path = self.make_run_dir(run_id) / HISTORY
            with name_unwritable(path):
                os.truncate(path, size)
        else:
            self.reset_history(run_id)

    def history_rows(self, run_id: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a run's history one by one, up to a line that is torn or no row; none where there is no history."""
        try:
            with open(self.run_dir(run_id) / HISTORY, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    row = json.loads(line)
                    if not is_history_row(row):
                        return
                    yield row
        except (FileNotFoundError, ValueError, RecursionError):
            return  # a torn last line, or a hostile one

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run's history up to a line that is torn or no row; [] where there is none.

        Of a history longer than `MAX_HISTORY_ROWS` every second row, every fourth and so on: what is held is bounded.
        """
        return thin_rows(self.history_rows(run_id), MAX_HISTORY_ROWS)

    def is_thinned(self, run_id: str) -> bool:
        """Whether `history` leaves rows out."""
        if self.history_size(run_id) < MAX_HISTORY_ROWS * MIN_ROW_BYTES:
            return False
        with open(self.run_dir(run_id) / HISTORY, "rb") as lines:
            return sum(1 for _ in lines) > MAX_HISTORY_ROWS

    def write_arrays(self, run_id: str, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write per-example results as `<name>.npz`: [N] arrays, no pickles."""
        atomic_write(self.make_run_dir(run_id) / f"{name}.npz", pack_columns(arrays))

    def arrays(self, run_id: str, name: str) -> dict[str, np.ndarray] | None:
        """Return what `write_arrays` wrote, or None. Raises `ExistingWork` for a torn or foreign file: a result is
        lost."""
        path = self.run_dir(run_id) / f"{name}.npz"
        try:
            found = read_columns(path, self.root)
        except FileNotFoundError:
            return None
        except Exception as e:  # zipfile and numpy raise a dozen kinds for broken files
            raise self._lost(path, run_id, type(e).__name__) from e
        sizes = {column.shape for column in found.values()}
        if len(sizes) > 1 or any(len(size) != 1 for size in sizes):
            raise self._lost(path, run_id, "columns of unequal length")
        return found

    def _lost(self, path: Path, run_id: str, why: str) -> ExistingWork:
        allowed = f"a whole file of arrays ({why}); start the sweep of {run_id} again: it trains that run anew"
        return ExistingWork("sweep.dir", str(path), allowed)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; {} where there is none. Raises `ExistingWork` for a file that is torn or no manifest."""
        try:
            data: dict[str, Any] = json.loads((self.root / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as e:
            why = f"its {MANIFEST} is not valid JSON ({e}); moved away, it is made anew and finished runs are kept"
            raise ExistingWork("sweep.dir", str(self.root), why) from e
        from lorabench.store import validation

        if wrong := validation.first_error(validation.MANIFEST, data):
            allowed = f"its {MANIFEST} is not a lorabench manifest of schema 1 (at {wrong}); {MANIFEST_WAY_OUT}"
            raise ExistingWork("sweep.dir", str(self.root), allowed)
        return data

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest; to be called under `locked`. Raises `Unwritable`."""
        atomic_write(self.root / MANIFEST, dump_json(manifest))
