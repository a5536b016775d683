"""A composed config as one job of a sweep. Torch is imported when a job runs, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lorabench.config import alpha_rules
from lorabench.config.runs import parse
from lorabench.runtime.files import keep_cache_as_it_is

if TYPE_CHECKING:
    from lorabench.sweep.packs import Job


def make_job(
    cfg: DictConfig,
    *,
    name: str,
    experiment: str | None,
    extra: Mapping[str, Any] | None = None,
    words: Sequence[str] = (),
) -> Job:
    """Parse a composed config. Raises `ConfigError`, before torch is imported.

    name: the sweep's where the config says none. extra: axes of the cell that its label does not show.
    words: the command line's words that ask for this run (`command_line.run_words`).
    """
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

        with open_dict(cfg), keep_cache_as_it_is(settings.sweep.dry_run):
            cfg.method.r, cfg.method.match_parameters = matched_rank(run), None  # its identity is that of its rank
        run, settings = parse(cfg)
    from lorabench.sweep.packs import Job, cell_label

    return Job(run, settings, cell_label(run, alpha_rule=_alpha_rule(cfg), extra=extra), tuple(words))


def _alpha_rule(cfg: DictConfig) -> str | None:
    """Return the rule by which alpha was asked for; None for a method without alpha."""
    alpha = OmegaConf.select(cfg, "method.alpha")
    if alpha is None:
        return None
    return alpha_rules.rule_text(alpha, use_rslora=bool(OmegaConf.select(cfg, "method.use_rslora")))
