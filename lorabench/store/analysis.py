"""The files in `<sweep dir>/analysis`: what a command measured of a finished sweep, one JSON object with a schema
each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.runtime.files import atomic_write
from lorabench.store.records import dump_json


@dataclass(frozen=True)
class AnalysisFile:
    """One file that an analysing command fills and reports read."""

    relative_path: Path  # below the sweep's directory
    schema: int
    indent: int | None  # of the JSON; None: no blanks, for long tables

    def path(self, sweep_dir: str | Path) -> Path:
        return Path(sweep_dir) / self.relative_path

    def read(self, sweep_dir: str | Path) -> dict[str, Any] | None:
        """Return the file's content, or None where there is no file.

        Raises OSError, UnicodeDecodeError or JSONDecodeError for a file that is no whole JSON, and a plain ValueError
        for one of another schema.
        """
        try:
            doc = json.loads(self.path(sweep_dir).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except RecursionError as e:
            raise json.JSONDecodeError("nested too deeply", "", 0) from e
        if not isinstance(doc, dict) or doc.get("schema") != self.schema:
            raise ValueError(f"not of schema {self.schema}")
        return doc

    def read_reusable(self, sweep_dir: str | Path) -> dict[str, Any]:
        """Return what an earlier call of the command left; empty where the file is missing, torn or of another
        schema."""
        try:
            return self.read(sweep_dir) or {}
        except (OSError, ValueError):
            return {}

    def write(self, sweep_dir: str | Path, doc: Mapping[str, Any]) -> None:
        """Replace the file by `doc` and its schema, whole or not at all. Raises `Unwritable`."""
        atomic_write(self.path(sweep_dir), dump_json({**doc, "schema": self.schema}, indent=self.indent))


WEIGHTS_FILE = AnalysisFile(Path("analysis", "weights.json"), schema=1, indent=None)
COSTS_FILE = AnalysisFile(Path("analysis", "costs.json"), schema=1, indent=1)
