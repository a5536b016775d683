"""PiSSA (Meng et al., arXiv 2404.02948): LoRA whose A and B start as the weight's largest singular components."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.fields import knob
from lorabench.methods.low_rank import FromWeight


@dataclass(frozen=True)
class Config(FromWeight):
    """Saved as a LoRA of rank 2r on the unchanged base."""

    name: str = knob("pissa", help="method")
    init: str = knob("pissa", help="how A and B start", choices=("pissa",), varies=True)
