"""The words of a command line: those that ask for a run, those that may be shown, and the sweep's name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorabench.config.runs import digest
from lorabench.config.secrets import mask_word

# Settings that say nothing of the run itself: where it goes, how it is judged or shown, its rate and its seed.
_NOT_OF_THE_RUN = re.compile(r"(sweep|report|study|tracker|hydra)([./@].*)?|seed|optimizer\.lr")


def config_dir() -> str:
    """Return the absolute path of the configs: the package's own `conf/` (a wheel), else the repository's."""
    package = Path(__file__).resolve().parent.parent
    return str(package / "conf" if (package / "conf").is_dir() else package.parent / "conf")


def sweep_name(overrides: Sequence[str], experiment: str | None) -> str:
    """Return the experiment's name, else a short hash of the overrides that do not only say where results go."""
    if experiment:
        return experiment
    asked = sorted(o for o in overrides if not o.lstrip("+").startswith(("sweep.", "report.", "tracker")))
    return f"run-{digest(asked)[:8]}"


def run_words(overrides: Sequence[str], config_sources: Iterable[Any] = ()) -> list[str]:
    """Return the words that ask for the same run but for its rate and seed.

    config_sources: Hydra's, among which a config folder of the user's own is found.
    """
    named = [o for o in overrides if not _NOT_OF_THE_RUN.fullmatch(o.lstrip("+~").partition("=")[0])]
    return _config_dir_words(config_sources) + [mask_word(word) for word in named]


def sweep_words(hydra: Any) -> list[str]:
    """Return the words of a sweep's command line as its manifest and reports show them.

    Secrets are masked (`config.secrets`), as is all of `hydra.launcher.setup`.
    hydra: the config's section of that name.
    """
    words = [o for o in (*hydra.overrides.hydra, *hydra.overrides.task) if not o.startswith("hydra.mode=")]
    return ["-m", *_config_dir_words(hydra.runtime.config_sources), *map(mask_word, words)]


def _config_dir_words(config_sources: Iterable[Any]) -> list[str]:
    paths = [s.path for s in config_sources if s.provider == "command-line"]
    return ["--config-dir", os.path.relpath(paths[0].removeprefix("file://"))] if paths else []
