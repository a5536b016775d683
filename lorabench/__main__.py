"""`python -m lorabench`: Hydra's command line.

Exit codes: 0 done; 1 some runs failed; 2 bad input, nothing written; 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lorabench.config.errors import ConfigError, Unwritable
from lorabench.launch.command_line import config_dir
from lorabench.launch.guards import check_arguments, explain_grammar_error, explain_unknown_setting, guard_yaml
from lorabench.launch.task_function import task_function
from lorabench.runtime import signals, streams
from lorabench.runtime.command import NESTED_TOO_DEEPLY, report_output
from lorabench.runtime.terminal import say


def main() -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us whole; what a user sees is decided here
    # Read when torch loads its threads. Ones that wait spin for milliseconds otherwise, and where another process wants
    # the core they spin on, every operation waits that long: a step then takes ten times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    streams.prepare()
    signals.install()
    code = _run()
    if code in (130, signals.EXIT_CODE):
        say("stopped; the same command goes on from here", error=True)
    if code := code or report_output():
        sys.exit(code)


def _run() -> Any:
    """Return the exit code; None is 0. What no user can mend is raised."""
    sys.argv[1:] = sorted(
        sys.argv[1:], key=lambda word: word not in ("-m", "--multirun")
    )  # Hydra takes them first only
    try:
        check_arguments(sys.argv[1:])
        guard_yaml()
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(task_function)()
    except KeyboardInterrupt:
        return 130
    except SystemExit as e:
        return e.code
    except Exception as e:
        if signals.is_stopping():  # a parser that SIGTERM broke off may raise something of its own over it
            return signals.EXIT_CODE
        if isinstance(e, OSError) and report_output():
            return 1
        if isinstance(e, (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError)):
            if isinstance(e, OverrideParseException):
                explained: ConfigError | None = explain_grammar_error(e)
            else:
                explained = explain_unknown_setting(str(e))
            say(f"error: {explained or e}", error=True)
            return 2
        if isinstance(e, RecursionError):
            say(NESTED_TOO_DEEPLY, error=True)
            return 2
        if isinstance(e, Unwritable):
            say(f"error: {e}; the same command goes on from here", error=True)
            return 1
        if type(e).__name__ != "SweepFailed":  # by name: importing it here would import torch
            raise
        say(f"error: {e}", error=True)
        return 1
    return None


if __name__ == "__main__":
    main()
