"""The cell that others are compared with where a study declares none. No scipy: a launch asks it, too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorabench.config.method_names import FULL
from lorabench.results.sweep import Cell


def default_reference(cells: Sequence[Cell]) -> Cell:
    """Return the cell that others are compared with where none is declared; the first of equals.

    The largest by trainable parameters of the main method, which is the one with most adapters; full fine-tuning where
    there is no adapter; else the first. Of one under several conditions it is the one of most training data. cells: one
    or more, in the order of tables.
    """
    adapters = [c for c in cells if c.adapter]
    if not adapters:
        return next((c for c in cells if c.method == FULL), cells[0])
    methods = [c.method for c in adapters]
    main = max(dict.fromkeys(methods), key=methods.count)  # of equals the first in the order of tables
    return max(
        (c for c in adapters if c.method == main), key=lambda c: (c.trainable or 0, c.r or 0, _train_examples(c))
    )


def _train_examples(cell: Cell) -> float:
    """Training examples, where they are an axis; more than any number where they are all there are."""
    asked = cell.conditions.get("task.train_examples", "0")
    return float(asked) if asked.isdigit() else math.inf
