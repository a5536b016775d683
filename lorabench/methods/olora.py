"""OLoRA (Büyükakyüz, arXiv 2406.01775): LoRA that starts from the QR decomposition of the weight.

B starts as the first columns of Q, A as the first rows of R.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.fields import knob
from lorabench.methods.low_rank import FromWeight


@dataclass(frozen=True)
class Config(FromWeight):
    """Saved as a LoRA of rank 2r on the unchanged base."""

    name: str = knob("olora", help="method")
    init: str = knob("olora", help="how A and B start", choices=("olora",), varies=True)
