"""Override sets into jobs. Composing is slow next to parsing, so what was composed once is kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from lorabench.config.errors import ConfigError
from lorabench.launch.command_line import run_words, sweep_name
from lorabench.launch.job import make_job

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job

RATE, SEED = "optimizer.lr", "seed"
# Axes that a cell's label shows already; any other axis is named beside it.
LABELLED_AXES = frozenset(
    {
        "method",
        "method.r",
        "method.alpha",
        "method.target_modules",
        "method.use_rslora",
        "method.match_parameters",
    }
)
_PLAIN_NUMBER = re.compile(r"optimizer\.lr=[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|seed=\d+", re.IGNORECASE)

_PLAIN_NAME = re.compile(r"\.*[A-Za-z_]\w*(\.\w+)*")  # of an interpolation: a setting, no resolver, nothing nested


def tune_seeds(config: DictConfig) -> list[int]:
    """Return the seeds that choose the rate, before anything is composed. Raises `ConfigError`."""
    seeds = OmegaConf.select(config, "sweep.tune_seeds")
    if not OmegaConf.is_list(seeds) or not seeds:
        raise ConfigError("sweep.tune_seeds", seeds, "a list of at least one seed: sweep.tune_seeds=[0,1] are two")
    return list(seeds)


class Composer:
    """Composes with Hydra's own loader, so that every group, default and interpolation holds as in a single run."""

    _last: Composer | None = None

    def __init__(self, context: HydraContext, config: DictConfig) -> None:
        self.loader, self.config = context.config_loader, config
        self.experiment = config.hydra.runtime.choices.get("experiment")
        self.sweep_name = sweep_name(config.hydra.overrides.task, self.experiment)
        self._jobs: dict[tuple[str, ...], Job] = {}
        self._firsts: dict[tuple[tuple[str, ...], frozenset[str]], Job] = {}  # by setting without rate and seed
        self._configs: dict[tuple[str, ...], DictConfig] = {}

    @classmethod
    def shared(cls, context: HydraContext, config: DictConfig) -> Composer:
        """Return the composer of this config: the sweeper and the launcher of one sweep share it."""
        if cls._last is None or cls._last.config is not config:
            cls._last = cls(context, config)
        return cls._last

    @property
    def name_overrides(self) -> tuple[str, ...]:
        """Overrides that every run of the sweep gets, so that all compose to one sweep's name."""
        return () if self.config.sweep.name else (f"sweep.name={self.sweep_name}",)

    @property
    def composed(self) -> list[Job]:
        """All jobs so far, a run once for each cell it belongs to."""
        return list(self._jobs.values())

    def job(self, overrides: Sequence[str], extra: Mapping[str, Any] | None = None) -> Job:
        """Return the job of one override set. extra: axes of its cell that the label does not show."""
        key = tuple(overrides)
        if key not in self._jobs:
            words = run_words(overrides, self.config.hydra.runtime.config_sources)
            self._jobs[key] = self._make(key, extra, words)
        return self._jobs[key]

    def _make(self, key: tuple[str, ...], extra: Mapping[str, Any] | None, words: Sequence[str]) -> Job:
        """Return a job: its setting is composed and validated once, its rate and seed are checked for each run."""
        numbers = dict(o.split("=", 1) for o in key if _PLAIN_NUMBER.fullmatch(o))
        rest = tuple(o for o in key if not _PLAIN_NUMBER.fullmatch(o))
        setting = (rest, frozenset(numbers))
        first = self._firsts.get(setting)
        if first is None:
            cfg = self._compose(rest, numbers)
            job = make_job(cfg, name=self.sweep_name, experiment=self.experiment, extra=extra, words=words)
            if not depends_on_numbers(cfg):
                self._firsts[setting] = job
            return job
        lr, seed = numbers.get(RATE), numbers.get(SEED)
        run = first.run.at(
            lr=first.run.optimizer.lr if lr is None else _parse_number(lr),
            seed=first.run.seed if seed is None else int(seed),
        )
        return replace(first, run=run, label={**first.label, "extra": dict(extra or {})}, asked=tuple(words))

    def jobs(self, override_sets: Sequence[Sequence[str]]) -> list[Job]:
        """Return the jobs of several override sets."""
        return [self.job(o) for o in override_sets]

    def _compose(self, rest: tuple[str, ...], numbers: Mapping[str, str]) -> DictConfig:
        """Return the config of an override set, without `hydra`. Hydra composes once; numbers are set on a copy.

        rest: the overrides that are no plain rate or seed. numbers: the others' values by key.
        """
        if rest not in self._configs:
            composed = self.loader.load_sweep_config(self.config, list(rest))
            with open_dict(composed):
                composed.pop("hydra", None)
            self._configs[rest] = composed
        cfg = copy.deepcopy(self._configs[rest])
        for key, value in numbers.items():
            OmegaConf.update(cfg, key, _parse_number(value))
        return cfg


def depends_on_numbers(cfg: DictConfig) -> bool:
    """Whether another setting may follow the rate or the seed: an interpolation names one, or cannot be told."""
    texts = re.findall(r"\$\{.*", OmegaConf.to_yaml(cfg))
    names = [name for text in texts for name in re.findall(r"\$\{([^}]*)\}?", text)]
    varying = {SEED, *RATE.split(".")}
    return any(not _PLAIN_NAME.fullmatch(name) or name.rpartition(".")[2] in varying for name in names)


def _parse_number(text: str) -> int | float:
    """Return a number of a command line as Hydra reads it: whole numbers stay whole."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def is_remote(launcher: Any) -> bool:
    """Whether a launcher's jobs may run on another machine: the packed one says so, submitit's and Ray's do by name."""
    if hasattr(launcher, "is_remote"):
        return bool(launcher.is_remote)
    return any(word in type(launcher).__module__ for word in ("submitit", "ray_launcher"))


def to_plain(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a plugin's settings without OmegaConf's containers, interpolations resolved."""
    if isinstance(settings, DictConfig):
        return OmegaConf.to_container(settings, resolve=True)  # type: ignore[return-value]
    return {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in (settings or {}).items()}
