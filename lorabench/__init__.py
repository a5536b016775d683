"""lorabench: which LoRA rank, alpha, modules and learning rate, answered with evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabench.report.notebook import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`lorabench.load` is imported when it is asked for (PEP 562): `import lorabench` alone stays instantaneous."""
    if name == "load":
        from lorabench.report.notebook import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
