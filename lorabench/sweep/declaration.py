"""What a study declares (`study.*`), held against its task, its cells and the sweep that is there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorabench.config import alpha_rules
from lorabench.config.cells import cell_id
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.settings import StudyConfig
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


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
