"""OLoRA (Büyükakyüz, arXiv 2406.01775): LoRA whose A and B start as the first columns and rows of the weight's Q and R."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.fields import knob
from lorabench.methods.low_rank import FromWeight


@dataclass(frozen=True)
class Config(FromWeight):
    """Saved as a LoRA of rank 2r on the unchanged base."""

    name: str = knob("olora", help="method")
    init: str = knob("olora", help="how A and B start", choices=("olora",), varies=True)
