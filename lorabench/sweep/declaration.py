"""What a study declares (`study.*`), held against its task, its cells and the sweep that is there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorabench.config import alpha_rules
from lorabench.config.cells import canonical, cell_id, cell_settings
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.overrides import override_value
from lorabench.config.settings import StudyConfig
from lorabench.results.formatting import check_margin
from lorabench.results.settings_apart import differences
from lorabench.store.records import Store
from lorabench.sweep.packs import Job

KEYS_WITHOUT_EFFECT = {
    "alpha_anchor"
}  # keys that change no number: a manifest from before they existed is not held to them
POST_HOC_COMMANDS = {"margin": "python -m lorabench.report {root} --margin {value}"}


def check_metrics(job: Job) -> None:
    """Raise `ConfigError` for a metric that the run's task does not have, or a rule that pruning would break."""
    study, names = job.settings.study, job.run.task.metric_names
    monitor = job.run.trainer.monitor
    followed = ("study.metric", study.metric), ("study.selection", study.selection), ("trainer.monitor", monitor)
    for key, value in followed:
        if value is not None and value not in names:
            raise ConfigError(key, value, f"a metric of task {job.run.task.name}: {', '.join(names)}")
    check_margin("study.margin", study.metric or job.run.task.metric, study.margin)
    for key, value in followed[1:]:
        if job.settings.sweep.prune and value not in (None, "loss"):
            allowed = f"false where {key}={value}: pruning ranks rates by validation loss"
            raise ConfigError("sweep.prune", True, allowed)


def check_cells(jobs: Sequence[Job]) -> None:
    """Raise `ConfigError` for a reference or family that is no cell, listed now or before, and for rules that do not
    meet."""
    study, manifest = jobs[0].settings.study, Store(jobs[0].settings.sweep.dir).manifest()
    cells = dict.fromkeys([*(c["id"] for c in manifest.get("cells", ())), *(cell_id(job.label) for job in jobs)])
    for key, names in (("study.reference", [study.reference]), ("study.family", study.family or [])):
        for name in names:
            if name is not None and name not in cells:
                raise ConfigError(key, name, f"a cell of this sweep: {', '.join(cells)}")
    if study.family is not None:
        if study.reference is None:
            raise ConfigError(
                "study.reference", None, "a cell: a declared family is compared with a declared reference"
            )
        if study.reference in study.family or len(set(study.family)) < len(study.family) or not study.family:
            raise ConfigError("study.family", study.family, "each cell once, without the reference; null: all")
    if study.alpha_anchor is not None:
        _check_anchor(study.alpha_anchor, {str(job.label["alpha_rule"]) for job in jobs if job.label.get("alpha_rule")})


def _check_anchor(rank: int, rules: Iterable[str]) -> None:
    found = {text: rule.scaling(rank) for text in sorted(rules) if (rule := alpha_rules.parse(text))}
    if not found:
        raise ConfigError("study.alpha_anchor", rank, "null: no cell of this sweep has an alpha")
    if max(found.values()) > min(found.values()) * (1 + 1e-6):
        said = ", ".join(f"alpha={rule} gives s = {s:.4g}" for rule, s in found.items())
        raise ConfigError("study.alpha_anchor", rank, f"a rank where the alpha rules give one scale; there {said}")


def check_unchanged(manifest: Mapping[str, Any], study: StudyConfig, root: Any) -> None:
    """Raise `ExistingWork` where the sweep that is there was declared otherwise: what is judged is fixed before it
    runs."""
    then, default = manifest.get("study"), asdict(StudyConfig())
    if not then:
        return
    for key, now in asdict(study).items():
        if key in KEYS_WITHOUT_EFFECT and key not in then:
            continue
        before = then.get(key, default[key])
        if now != before:
            later = POST_HOC_COMMANDS[key].format(root=root, value=now) if key in POST_HOC_COMMANDS else ""
            raise ExistingWork(
                f"study.{key}",
                now,
                f"the sweep in {root} was declared with {_text(before)} (study {manifest.get('study_hash')}); another sweep.name"
                + (
                    f", or report it post hoc with {later}"
                    if later
                    else f", or study.{key}={_text(before)} as declared"
                ),
            )


def check_standing(store: Store, jobs: Sequence[Job]) -> None:
    """Raise `ExistingWork` where the jobs do not fit what the sweep holds: its declaration, its cells' settings, the
    data and the base that its runs were trained on. Nothing is written."""
    manifest, settings = store.manifest(), jobs[0].settings
    check_unchanged(manifest, settings.study, store.root)
    check_one_setting(manifest, jobs, store.root)
    if not settings.sweep.accept_drift:
        _check_same_data(manifest, store, jobs)


def _check_same_data(manifest: Mapping[str, Any], store: Store, jobs: Sequence[Job]) -> None:
    from lorabench.sweep.resume import check_drift  # torch: not before it is needed

    cells = {c["id"]: [i for ids in c["runs"].values() for i in ids] for c in manifest.get("cells", ())}
    joining = {cell_id(j.label): j.run for j in jobs if j.run.run_id not in manifest.get("runs", {})}
    for name, run in joining.items():
        found = (store.read(i) for i in cells.get(name, ()))
        if record := next((r for r in found if r is not None and r.status != "failed"), None):
            check_drift(record, run)


def check_one_setting(manifest: Mapping[str, Any], jobs: Sequence[Job], root: Any) -> None:
    """Raise `ExistingWork` where a run would join a cell whose runs have other settings, or bring data, base or budget
    that the sweep has not seen and no axis of its cell shows. Runs that are listed already are not asked again."""
    listed = manifest.get("runs", {})
    cells = {c["id"]: _first_config(c, listed) for c in manifest.get("cells", ())}
    standing = {name: cell_settings(config) for name, config in cells.items() if config}
    seen: dict[str, set[str]] = {}
    for settings in standing.values():
        for key, value in settings.items():
            seen.setdefault(key, set()).add(canonical(value))
    begun = bool(standing)
    for job in jobs:
        if job.run.run_id in listed:
            continue
        name, now = cell_id(job.label), cell_settings(job.run.to_dict())
        if name in standing:
            _refuse(differences(standing[name], now), standing[name], now, f"cell {name} of the sweep in {root}")
        elif begun:
            shown = job.label["extra"]
            common = [k for k in now if not k.startswith("method.") and k not in shown and k.split(".")[0] not in shown]
            fresh = [key for key in common if canonical(now[key]) not in seen.get(key, {canonical(now[key])})]
            _refuse(fresh, next(iter(standing.values())), now, f"the sweep in {root}")
        standing.setdefault(name, now)


def _first_config(cell: Mapping[str, Any], listed: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((listed[i]["config"] for ids in cell["runs"].values() for i in ids if i in listed), None)


def _refuse(keys: Sequence[str], then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    if not keys:
        return
    key = keys[0]
    before, after = (override_value(values.get(key)) for values in (then, now))
    others = f" (and other values of {', '.join(keys[1:])})" if keys[1:] else ""
    raise ExistingWork(
        key,
        after,
        f"{where} was trained with {before}{others}: one average of both would be of neither; another sweep.name, or "
        f"one multirun that has both as an axis under another sweep.name: -m {key}={before},{after}",
    )


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
