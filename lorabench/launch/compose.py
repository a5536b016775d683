"""Override sets -> jobs. Composing is slow next to parsing, so a set that was composed once is kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lorabench.config.errors import ConfigError
from lorabench.launch.app import asked, job, sweep_name

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job


NUMBER = re.compile(r"optimizer\.lr=[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|seed=\d+", re.IGNORECASE)


def number(text: str) -> int | float:
    """A number of a command line, as Hydra reads it: whole numbers stay whole."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def tune_seeds(config: DictConfig) -> list[int]:
    """The seeds that choose the rate, which are read before anything is composed. Raises `ConfigError`."""
    found = OmegaConf.select(config, "sweep.tune_seeds")
    if not OmegaConf.is_list(found) or not found:
        raise ConfigError("sweep.tune_seeds", found, "a list of at least one seed, such as [0,1]")
    return list(found)


class Composer:
    """Composes with Hydra's own loader, so that every group, default and interpolation holds as in a single run."""

    _last: Composer | None = None

    def __init__(self, context: HydraContext, config: DictConfig) -> None:
        self.loader, self.config = context.config_loader, config
        self.experiment = config.hydra.runtime.choices.get("experiment")
        self.name = sweep_name(config.hydra.overrides.task, self.experiment)
        self._kept: dict[tuple[str, ...], Job] = {}
        self._configs: dict[tuple[str, ...], DictConfig] = {}

    @classmethod
    def of(cls, context: HydraContext, config: DictConfig) -> Composer:
        """The composer of this config: the sweeper and the launcher of one sweep share it."""
        if cls._last is None or cls._last.config is not config:
            cls._last = cls(context, config)
        return cls._last

    def job(self, overrides: Sequence[str], extra: Mapping[str, Any] | None = None) -> Job:
        key = tuple(overrides)
        if key not in self._kept:
            words = asked(overrides, self.config.hydra.runtime.config_sources)
            cfg = self._composed(key)
            self._kept[key] = job(cfg, name=self.name, experiment=self.experiment, extra=extra, words=words)
        return self._kept[key]

    def _composed(self, overrides: tuple[str, ...]) -> DictConfig:
        """Hydra composes a set once for all its rates and seeds: those are plain numbers, set on a copy."""
        numbers = [o for o in overrides if NUMBER.fullmatch(o)]
        rest = tuple(o for o in overrides if o not in numbers)
        if rest not in self._configs:
            self._configs[rest] = self.loader.load_sweep_config(self.config, list(rest))
        cfg = copy.deepcopy(self._configs[rest])
        for override in numbers:
            name, _, value = override.partition("=")
            OmegaConf.update(cfg, name, number(value))
        return cfg

    @property
    def composed(self) -> list[Job]:
        """All jobs so far, a run once for each cell it belongs to."""
        return list(self._kept.values())

    def jobs(self, override_sets: Sequence[Sequence[str]]) -> list[Job]:
        return [self.job(o) for o in override_sets]


def elsewhere(launcher: Any) -> bool:
    """Whether a launcher's jobs may run on another machine: the packed one says so, submitit's and Ray's do by name."""
    own = getattr(launcher, "elsewhere", None)
    return bool(own) if own is not None else any(w in type(launcher).__module__ for w in ("submitit", "ray_launcher"))
