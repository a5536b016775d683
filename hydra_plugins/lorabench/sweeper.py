"""`hydra/sweeper=grid`: a union of grids, tuned and then confirmed (design: two phases, each run its role)."""

# No `from __future__ import annotations`, and helpers in `_modules`: Hydra executes plugin files outside sys.modules.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lorabench.launch.grid import RATE, SEED, Point, expand
from lorabench.sweep import phases


@dataclass
class GridSweeperConf:
    """params: axes of all grids; grids: named grids, each a product of axes, `zip` for axes that advance together."""

    _target_: str = "hydra_plugins.lorabench.sweeper.GridSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)


EXTENSIONS = 6  # rates added to a cell at most: a factor of 64 where rates double
LABELLED = (
    "method", "method.r", "method.alpha", "method.target_modules", "method.use_rslora", "method.match_parameters"
)  # fmt: skip

ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="lorabench")


class GridSweeper(Sweeper):
    """Lists cells x rates x tuning seeds, launches them, chooses a rate a cell, launches the confirmation seeds."""

    def __init__(self, params: Mapping[str, Any], grids: Mapping[str, Any]) -> None:
        self.params, self.grids = _plain(params), _plain(grids)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lorabench.launch.compose import Composer, elsewhere, tune_seeds

        assert self.config is not None and self.launcher is not None
        composer = Composer.of(self.context, self.config)
        points = expand(self.grids, self.params, arguments)
        extras = _extras(points)
        role, self.tune_seeds = self.config.sweep.role, tune_seeds(self.config)
        always = () if self.config.sweep.name else (f"sweep.name={composer.name}",)
        listed = {
            (*p.fixed, *rate, f"{SEED}={seed}", *always): (p, extras[i])
            for i, p in enumerate(points)
            for rate in ((r,) for r in p.rates or (f"{RATE}={self.config.optimizer.lr}",))
            for seed in _seeds(p, self.tune_seeds)
        }
        jobs = {overrides: composer.job(overrides, extra) for overrides, (_, extra) in listed.items()}
        settings = next(iter(jobs.values())).settings
        from lorabench.launch import app
        from lorabench.sweep import declaration
        from lorabench.sweep import execute as sweep

        phases.require_fresh(settings, {job.run.seed for job in jobs.values()} if role == "tune" else ())
        declaration.check_cells(list(jobs.values()))
        phases.declare(list(jobs.values()), app.launched(self.config.hydra))
        returned, cells = list(self.launcher.launch(_once(jobs), 0)), _cells(jobs, listed)
        if settings.sweep.extend_lr and role == "tune" and not settings.sweep.dry_run:
            returned += self._extend(composer, settings, jobs, cells, always)
        if settings.sweep.confirm_seeds and role == "tune" and not settings.sweep.dry_run:
            chosen = phases.chosen_rates(settings)
            confirm = {
                (*p.fixed, f"{RATE}={chosen[name]!r}", f"{SEED}={seed}", "sweep.role=confirm", *always): extra
                for name, (p, extra) in cells.items()
                if name in chosen
                for seed in settings.sweep.confirm_seeds
            }
            if confirm:
                confirming = {overrides: composer.job(overrides, extra) for overrides, extra in confirm.items()}
                phases.declare(list(confirming.values()))
                returned = [*returned, *self.launcher.launch(_once(confirming), len(listed))]
        if not elsewhere(self.launcher):  # seconds of this machine would say nothing of a node's
            phases.measure_cells(settings, list(jobs.values()))
        sweep.finish(settings)
        return returned

    def _extend(
        self,
        composer: Any,
        settings: Any,
        jobs: dict[tuple[str, ...], Any],
        cells: Mapping[str, Any],
        always: Sequence[str],
    ) -> list[Any]:
        """Tune one more rate outward in every cell whose best lies at an end, until none does; jobs grow by what was added."""
        from lorabench.sweep.packs import cell_id

        assert self.config is not None and self.launcher is not None
        returned: list[Any] = []
        rates: dict[str, set[float]] = {}
        for job in jobs.values():
            rates.setdefault(cell_id(job.label), set()).add(job.run.optimizer.lr)
        most = {name: len(tried) + EXTENSIONS for name, tried in rates.items()}
        while True:
            outward = {n: lr for n, lr in phases.outward_rates(settings, rates, most).items() if n in cells}
            for name, lr in outward.items():
                rates[name].add(lr)
            added = {
                (*p.fixed, f"{RATE}={lr!r}", f"{SEED}={seed}", *always): extra
                for name, lr in outward.items()
                for p, extra in [cells[name]]
                for seed in _seeds(p, self.tune_seeds)
            }
            if not added:
                break
            more = {overrides: composer.job(overrides, extra) for overrides, extra in added.items()}
            phases.declare(list(more.values()))
            returned += self.launcher.launch(_once(more), len(jobs))
            jobs |= more
        return returned


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value, resolve=True)  # type: ignore[return-value]
    return dict(value or {})


def _seeds(point: Point, tune_seeds: Sequence[int]) -> list[str]:
    """A seed axis of the grid or the command line, else the sweep's tuning seeds."""
    return [t.split("=", 1)[1] for t in point.seeds] if point.seeds else [str(s) for s in tune_seeds]


def _extras(points: Sequence[Point]) -> list[dict[str, str]]:
    """Axes that tell cells apart and are no part of a method's own label, for each point."""
    values: dict[str, set[str]] = {}
    for p in points:
        for key, value in p.axes.items():
            values.setdefault(key, set()).add(value)
    shown = {k for k, v in values.items() if len(v) > 1 and k not in LABELLED}
    return [{k: v for k, v in p.axes.items() if k in shown} for p in points]


def _once(jobs: Mapping[tuple[str, ...], Any]) -> list[list[str]]:
    """One override set a run: a run that belongs to two cells trains once."""
    sets = {job.run.run_id: list(overrides) for overrides, job in reversed(list(jobs.items()))}
    return [sets[i] for i in dict.fromkeys(job.run.run_id for job in jobs.values())]


def _cells(jobs: Mapping[tuple[str, ...], Any], listed: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    from lorabench.sweep.packs import cell_id

    return {cell_id(job.label): listed[overrides] for overrides, job in jobs.items()}
