"""Claims of the literature, judged on a sweep's records. Each is bound to the conditions it was made under."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorabench.claims import quality as claims_quality
from lorabench.claims import rates as claims_rates
from lorabench.claims import weights as claims_weights
from lorabench.claims.verdict import Verdict
from lorabench.results import formatting
from lorabench.results.evidence import Evidence, gather
from lorabench.results.sweep import Sweep

if TYPE_CHECKING:
    from rich.table import Table

CLAIMS: tuple[Callable[[Evidence], Verdict], ...] = (
    claims_rates.ratio_in_long_runs,
    claims_rates.ratio_in_short_runs,
    claims_rates.rate_moves_little,
    claims_rates.slope_with_alpha_fixed,
    claims_rates.slope_with_scale_fixed,
    claims_rates.slope_with_rslora,
    claims_quality.attention_is_worse,
    claims_quality.gap_grows_with_batch,
    claims_quality.methods_agree,
    claims_quality.scale_is_free,
    claims_quality.scale_is_bound,
    claims_weights.full_needs_more_rank,
    claims_weights.forgets_less,
    claims_weights.intruders_come_with_lora,
    claims_weights.intruders_go_with_forgetting,
)


def judge(sweep: Sweep) -> list[Verdict]:
    """Every claim of the table, in its order. Raises `ConfigError` for an analysis file that is none."""
    return judge_evidence(gather(sweep))


def judge_evidence(evidence: Evidence) -> list[Verdict]:
    return [claim(evidence) for claim in CLAIMS]


def rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return verdicts as JSON takes them: the interval is two numbers, or null."""
    return [{**asdict(v), "interval": None if v.interval is None else list(v.interval)} for v in verdicts]


STATUS_COLOURS = {"holds": "green", "contradicted": "red", "not enough evidence": "yellow", "not applicable": "dim"}
SETTLE_HEADS = {"not enough evidence": "To settle it", "not applicable": "To ask it"}


def table(name: str, verdicts: Sequence[Verdict]) -> Table:
    """For a terminal: what is claimed, how it stands, the number, and why or what would settle it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(f"Claims of the literature on {name}"), box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True
    )
    for title, ratio in (("claim", 4), ("status", 2), ("number (95 %)", 2), ("why; what would settle it", 5)):
        made.add_column(title, ratio=ratio, overflow="fold")
    made.caption = Text(
        "holds: the 90 % interval lies inside what is claimed; contradicted: the 95 % interval lies outside. "
        "Claims are judged one by one, without a correction for their number."
    )
    made.caption_justify = "left"
    for v in verdicts:
        why = v.reason + (f". {SETTLE_HEADS[v.status]}: {v.settle}" if v.settle else "")
        claim = Text(v.claim).append(f"\n{v.source}", style="dim")
        made.add_row(claim, Text(v.status, style=STATUS_COLOURS[v.status]), Text(number_text(v)), Text(why))
    return made


def number_text(v: Verdict) -> str:
    """`9.6 times (7.1 to 13.0)`: the bounds with the decimals of the number."""
    if v.interval is None:
        return v.number
    decimals = re.search(r"\d\.(\d+)", v.number)
    low, high = (_bound(x, len(decimals[1]) if decimals else None) for x in v.interval)
    return f"{v.number} ({low} to {high})"


def _bound(x: float, decimals: int | None) -> str:
    if decimals is None or abs(x) >= 100 or not math.isfinite(x):
        return f"{x:.3g}".replace("-", "−").replace("inf", "∞")
    return formatting.number(x, min(decimals, 1) if abs(x) >= 10 else decimals)
