"""A sweep directory as the report sees it: cells with their runs, records, and what the study declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.config import alpha_rules
from lorabench.config.errors import ConfigError
from lorabench.config.method_names import ORDER, in_words
from lorabench.results.derived import derive_cells, setting_text
from lorabench.results.formatting import check_margin, natural_key
from lorabench.results.selection import Choice, choose, lower_is_better, selection_metric
from lorabench.results.settings_apart import split_cells
from lorabench.store.records import Record, Store

DEFAULT_MARGIN = 0.02  # of a sweep that declares none


@dataclass(frozen=True)
class Cell:
    """One thing compared, and the runs that are in it."""

    id: str
    method: str
    r: int | None
    alpha: float | None
    alpha_rule: str | None
    targets: str
    extra: tuple[tuple[str, str], ...]  # other axes on which cells differ
    trainable: int | None
    tune: tuple[str, ...]
    confirm: tuple[str, ...]
    solo: Mapping[str, Any] = field(
        default_factory=dict
    )  # seconds, tokens, steps, peak_memory_bytes of a few steps alone

    @property
    def series(self) -> tuple[Any, ...]:
        """What cells along one rank axis have in common."""
        return (self.method, self.alpha_rule if self.r else None, self.targets, self.extra)

    @property
    def adapter(self) -> bool:
        return self.r is not None

    @property
    def conditions(self) -> Mapping[str, str]:
        """Axes that are no part of the method: data, base, budget."""
        return {k: v for k, v in self.extra if k.split(".")[0] != "method"}


@dataclass(frozen=True)
class OtherMetric:
    """A metric of the records that the report is to be about instead of the declared one."""

    name: str
    lower_is_better: bool = False


@dataclass(frozen=True)
class Sweep:
    """Everything a report is made of."""

    name: str
    manifest: Mapping[str, Any]  # as stored; with cells made from the configs where it has none
    cells: tuple[Cell, ...]  # in the order of tables
    records: Mapping[str, Record]
    store: Store
    post_hoc: float | None = None  # a margin that was asked for after the sweep ran
    other: OtherMetric | None = None  # and a metric

    @cached_property
    def choices(self) -> dict[str, Choice]:
        return choose(self.manifest, self.records)

    @cached_property
    def names(self) -> dict[str, str]:
        """A short name of every cell: its method and rank, and of the rest what differs between cells."""
        return _names(self.cells)

    @property
    def study(self) -> Mapping[str, Any]:
        return self.manifest.get("study") or {}

    @property
    def declared_margin(self) -> float | None:
        margin = self.study.get("margin")
        return None if margin is None else float(margin)

    @property
    def margin(self) -> float:
        return self.post_hoc or self.declared_margin or DEFAULT_MARGIN

    @property
    def selection(self) -> str:
        """The validation metric that chooses rates."""
        return selection_metric(self.manifest)

    def worse(self, score: float) -> float:
        """A validation score of the selection metric, so that the least is the best."""
        lower = self.selection == "loss" or lower_is_better(self.manifest, self.selection)
        return score if lower else -score

    @property
    def confirmed(self) -> bool:
        """Whether any confirmation run has ended well: only then is there a test result."""
        return any(self.completed_records(c.confirm) for c in self.cells)

    @property
    def outside(self) -> list[Record]:
        """Records of runs that no cell lists."""
        inside = {i for c in self.cells for i in (*c.tune, *c.confirm)}
        return [r for i, r in sorted(self.records.items()) if i not in inside]

    @property
    def planned(self) -> list[str]:
        """Runs that cells list, each once."""
        return sorted({i for c in self.cells for i in (*c.tune, *c.confirm)})

    def records_of(self, run_ids: Sequence[str]) -> list[Record]:
        """Their records, by seed, then run_id."""
        found = [self.records[i] for i in run_ids if i in self.records]
        return sorted(found, key=lambda r: (r.config["seed"], r.run_id))

    def completed_records(self, run_ids: Sequence[str]) -> list[Record]:
        return [r for r in self.records_of(run_ids) if r.status == "completed"]

    @property
    def edit_notice(self) -> str | None:
        """A sentence that names the records that were edited since they were written; None where there are none."""
        edited = sorted(self.store.edited & self.records.keys())
        if not edited:
            return None
        some = ", ".join(edited[:5]) + (", …" if len(edited) > 5 else "")
        count = f"{len(edited)} record" + ("s" if len(edited) > 1 else "")
        return (
            f"{count} changed after being written ({some}): the checksum in run.json no longer fits. "
            "With that run.json moved away, the sweep's command trains the run again."
        )

    @cached_property
    def metric(self) -> str:
        """The metric of the tables: the one asked for, else the primary one."""
        return self.other.name if self.other else self.primary

    @cached_property
    def primary(self) -> str:
        """The primary metric: the declared one, else the one most records name."""
        if declared := self.study.get("metric"):
            return str(declared)
        named = [str(r.metrics["primary"]) for r in self.records.values() if r.metrics.get("primary")]
        return max(sorted(set(named)), key=named.count) if named else "loss"

    @property
    def lower_is_better(self) -> bool:
        """Whether less of that metric is better: as a record says, else by its name."""
        if self.other:
            return self.other.lower_is_better or lower_is_better(self.manifest, self.metric)
        said = [
            r.metrics["lower_is_better"]
            for r in self.records.values()
            if "lower_is_better" in r.metrics and r.metrics.get("primary") == self.metric
        ]
        return bool(said[0]) if said else lower_is_better(self.manifest, self.metric)


def load(sweep_dir: str | Path, *, margin: float | None = None, metric: OtherMetric | None = None) -> Sweep:
    """Read a sweep directory. margin, metric: others than the declared ones, post hoc. Raises `ConfigError` where there
    is no sweep, where no run of it has finished, for a margin that is not above 0, and for a metric that no test result
    has."""
    if margin is not None and not 0 < margin < float("inf"):
        raise ConfigError(
            "margin", margin, "a number above 0, in the metric's own unit (0.01 is one point of accuracy)"
        )
    root = Path(sweep_dir)
    if not root.is_dir():
        raise ConfigError("sweep dir", str(sweep_dir), "an existing directory that `python -m lorabench` wrote")
    store = Store(root)
    manifest, records = store.manifest(), {r.run_id: r for r in store.records()}
    if not manifest and not records:
        raise ConfigError(
            "sweep dir", str(sweep_dir), "a sweep's directory; this one holds neither sweep.json nor runs"
        )
    if not any(r.status == "completed" for r in records.values()):
        planned = len(manifest.get("runs", {}))
        state = ", ".join(f"{n} {s}" for s, n in _status_counts(records.values())) or "none has ended"
        raise ConfigError(
            "sweep dir", str(sweep_dir), f"a sweep with finished runs; of {planned or len(records)} runs: {state}"
        )
    if not manifest.get("cells"):
        manifest = {**manifest, **derive_cells(records)}
    manifest = split_cells(manifest, records)
    cells = cells_of(manifest, records)
    name = str(manifest.get("name") or root.resolve().name)
    sweep = Sweep(name, manifest, tuple(cells), records, store)
    if margin is not None:
        check_margin("margin", metric.name if metric else sweep.primary, margin)
    if metric is not None and metric.name != sweep.primary:
        return _by_metric(sweep, metric, margin)
    return sweep if margin in (None, sweep.declared_margin) else replace(sweep, post_hoc=margin)


def cells_of(manifest: Mapping[str, Any], records: Mapping[str, Record]) -> list[Cell]:
    """Return a manifest's cells in the order of tables. records: by run_id, as far as there are some."""
    return sorted((_cell(c, records) for c in manifest["cells"]), key=_table_order)


def _by_metric(sweep: Sweep, metric: OtherMetric, margin: float | None) -> Sweep:
    """The sweep by another metric, which takes a margin of its own."""
    known = sorted(
        {k.removeprefix("test/") for r in sweep.records.values() for k in r.metrics if k.startswith("test/")}
    )
    if metric.name not in known:
        raise ConfigError("metric", metric.name, f"one that test results have: {', '.join(known) or 'there are none'}")
    if margin is None:
        raise ConfigError("margin", None, f"a margin of {metric.name}: the declared one is of {sweep.primary}")
    return replace(sweep, post_hoc=margin, other=metric)


def _status_counts(records: Any) -> list[tuple[str, int]]:
    statuses = [r.status for r in records]
    return [(s, statuses.count(s)) for s in sorted(set(statuses))]


def _cell(entry: Mapping[str, Any], records: Mapping[str, Record]) -> Cell:
    label, runs = entry["label"], entry["runs"]
    tune, confirm = tuple(runs.get("tune", ())), tuple(runs.get("confirm", ()))
    counted = [records[i].resources.get("trainable_parameters") for i in (*tune, *confirm) if i in records]
    trainable = next((int(n) for n in counted if n is not None), label.get("trainable"))
    extra = tuple(sorted((str(k), setting_text(v)) for k, v in (label.get("extra") or {}).items()))
    return Cell(
        entry["id"],
        str(label["method"]),
        label.get("r"),
        label.get("alpha"),
        label.get("alpha_rule"),
        str(label.get("targets") or ""),
        extra,
        trainable,
        tune,
        confirm,
        entry.get("solo") or {},
    )


def _table_order(cell: Cell) -> tuple[Any, ...]:
    """Adapters first, by series and rank; then what else trains, from little to much."""
    known = ORDER.index(cell.method) if cell.method in ORDER else len(ORDER)
    extra = tuple((k, natural_key(v)) for k, v in cell.extra)  # 500 before 2500
    series = (
        (known, cell.method, alpha_rules.size_key(str(cell.alpha_rule)), cell.targets, extra) if cell.adapter else ()
    )
    return (not cell.adapter, series, cell.r or 0, cell.trainable or 0, known, extra, cell.id)


# -- names -----------------------------------------------------------------------------------------------------------


def _names(cells: Sequence[Cell]) -> dict[str, str]:
    adapters = [c for c in cells if c.adapter]
    targets = len({c.targets for c in adapters}) > 1
    varied = {k for c in cells for k, v in c.extra if any(dict(o.extra).get(k) != v for o in cells)}
    without_rule = [(c.method, c.r, c.targets, c.extra) for c in adapters]
    ruled = {
        key[0] for key in without_rule if without_rule.count(key) > 1
    }  # methods whose cells only alpha tells apart
    names = {}
    for c in cells:
        name = f"{c.method} r = {c.r}" if c.adapter else in_words(c.method)
        if c.adapter and targets:
            name += f" on {shorten(c.targets)}"
        apart = [f"α = {alpha_rules.round_alpha(c.alpha_rule)}"] if c.adapter and c.method in ruled else []
        apart += [f"{k.split('.')[-1]} {shorten(v)}" for k, v in c.extra if k in varied]
        names[c.id] = f"{name} ({', '.join(apart)})" if apart else name
    return names


def shorten(text: str, most: int = 32) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
