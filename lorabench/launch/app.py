"""Where Hydra meets lorabench: composed config in, one job out. Torch is imported when a job runs, not before."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lorabench.config import alpha_rules
from lorabench.config.errors import ConfigError
from lorabench.config.runs import digest, parse


def config_dir() -> str:
    """The package's own `conf/` (a wheel), else the repository's (a checkout), as an absolute path."""
    here = Path(__file__).resolve().parent.parent
    return str(here / "conf" if (here / "conf").is_dir() else here.parent / "conf")


def sweep_name(overrides: Sequence[str], experiment: str | None) -> str:
    """The experiment's name, else a short hash of what was asked for (where it goes and how it shows is not asked)."""
    if experiment:
        return experiment
    asked = sorted(o for o in overrides if not o.lstrip("+").startswith(("sweep.", "report.", "tracker")))
    return f"run-{digest(asked)[:8]}"


PLACED = re.compile(r"(sweep|report|study|tracker|hydra)([./@].*)?|seed|optimizer\.lr")


def asked(overrides: Sequence[str], sources: Iterable[Any] = ()) -> list[str]:
    """Words of a command line that ask for the same run but for its rate and seed, and say nothing of where it goes, how it
    is judged or shown. sources: Hydra's, for a config folder of the user's own."""
    return _folder(sources) + [o for o in overrides if not PLACED.fullmatch(o.lstrip("+~").partition("=")[0])]


SECRET = re.compile(r"(\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=[\"']?)[^\s'\",;\]]+")


def launched(hydra: Any) -> list[str]:
    """The words of the command line of a sweep, which go into its manifest and reports: without the values of variables that
    hold keys, as in `hydra.launcher.setup=['export HF_TOKEN=...']`. hydra: the config's own section of that name."""
    words = [o for o in (*hydra.overrides.hydra, *hydra.overrides.task) if not o.startswith("hydra.mode=")]
    return ["-m", *_folder(hydra.runtime.config_sources), *(SECRET.sub(r"\1***", word) for word in words)]


def _folder(sources: Iterable[Any]) -> list[str]:
    own = [s.path for s in sources if s.provider == "command-line"]
    return ["--config-dir", os.path.relpath(own[0].removeprefix("file://"))] if own else []


def job(
    cfg: DictConfig,
    *,
    name: str,
    experiment: str | None,
    extra: Mapping[str, Any] | None = None,
    words: Sequence[str] = (),
) -> Any:
    """Parse a composed config into a `planning.Job`. words: what `asked` gives. Raises `ConfigError`, before torch is imported."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
        if OmegaConf.select(cfg, "sweep.name") is None and OmegaConf.select(cfg, "sweep") is not None:
            cfg.sweep.name = name
        if experiment and OmegaConf.select(cfg, "sweep") is not None:
            cfg.sweep.experiment = experiment
    run, settings = parse(cfg)
    if run.method.match_parameters:
        from lorabench.training.preparation import matched_rank

        with open_dict(cfg):
            cfg.method.r, cfg.method.match_parameters = matched_rank(run), None  # the run is that of its rank
        run, settings = parse(cfg)
    from lorabench.sweep.packs import Job, label_of

    return Job(run, settings, label_of(run, alpha_rule=alpha_rule(cfg), extra=extra), tuple(words))


def alpha_rule(cfg: DictConfig) -> str | None:
    """How alpha was asked for: `16`, `2r`, with rsLoRA's scaling named."""
    raw = OmegaConf.select(cfg, "method.alpha")
    if raw is None:
        return None
    return alpha_rules.rule_text(raw, use_rslora=bool(OmegaConf.select(cfg, "method.use_rslora")))


def task(cfg: DictConfig) -> float:
    """Hydra's task function: one run. Returns its primary validation metric, NaN if it failed; never raises for it."""
    hydra = HydraConfig.get()
    try:
        return _run(cfg, hydra)
    except ConfigError as e:  # leaves before Hydra prints the overrides above the message
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e


def _run(cfg: DictConfig, hydra: Any) -> float:
    alone = hydra.mode is None or hydra.mode.name == "RUN"
    experiment = hydra.runtime.choices.get("experiment")
    words = asked(hydra.overrides.task, hydra.runtime.config_sources)
    made = job(cfg, name=sweep_name(hydra.overrides.task, experiment), experiment=experiment, words=words)
    from lorabench.sweep.execute import execute, finish

    (record,) = execute([made])
    if alone:
        finish(made.settings)
    return primary(record)


def primary(record: Any) -> float:
    """The recorded primary metric on validation data; NaN where there is none."""
    if record is None or record.status != "completed":
        return float("nan")
    return float(record.metrics[f"val/{record.metrics['primary']}"])
