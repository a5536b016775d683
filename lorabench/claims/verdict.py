"""A claim, and how one is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorabench.results.best_rate import Missing
from lorabench.results.formatting import plural
from lorabench.stats import power
from lorabench.stats.estimates import Estimate

Status = Literal["holds", "contradicted", "not enough evidence", "not applicable"]


@dataclass(frozen=True)
class Verdict:
    """What a sweep says about one claim."""

    claim: str
    source: str
    status: Status
    number: str = ""  # with its unit
    interval: tuple[float, float] | None = None  # 95 %, of the number, in the unit `number` shows
    reason: str = ""  # how it was judged; of "not applicable" the condition that is not met
    settle: str = ""  # the runs that would settle what is open, or that a sweep without the subject would need


@dataclass(frozen=True)
class Claim:
    """A sentence of the literature and where it stands."""

    text: str
    source: str

    def verdict(
        self, status: Status, number: str, interval: tuple[float, float] | None, reason: str, settle: str = ""
    ) -> Verdict:
        return Verdict(self.text, self.source, status, number, interval, reason, settle if _is_open(status) else "")

    def lacks(self, missing: Missing, number: str = "") -> Verdict:
        return Verdict(self.text, self.source, "not enough evidence", number, None, missing.reason, missing.settle)

    def needs(self, reason: str, settle: str, number: str = "") -> Verdict:
        return self.lacks(Missing(reason, settle), number)

    def absent(self, reason: str, settle: str) -> Verdict:
        """The sweep does not ask about it; settle: what would."""
        return Verdict(self.text, self.source, "not applicable", "", None, reason, settle)

    def outside(self, condition: str, number: str = "") -> Verdict:
        return Verdict(self.text, self.source, "not applicable", number, None, condition)


def _is_open(status: Status) -> bool:
    return status == "not enough evidence"


def judge_range(e: Estimate, low: float, high: float) -> Status:
    """A number against the range a claim gives it."""
    near, wide = e.interval(0.90), e.interval(0.95)
    if low < near[0] and near[1] < high:
        return "holds"
    return "contradicted" if wide[1] < low or wide[0] > high else "not enough evidence"


def decide(holds: bool, beyond: bool) -> Status:
    return "holds" if holds else "contradicted" if beyond else "not enough evidence"


def negate(status: Status) -> Status:
    """Return the verdict on the claim that says the opposite."""
    turned: dict[Status, Status] = {"holds": "contradicted", "contradicted": "holds"}
    return turned.get(status, status)


def seeds_to_settle(e: Estimate, low: float, high: float, kind: str) -> str:
    """Return how many seeds would place a number inside or outside a range. kind: tuning, confirmation."""
    needed = power.seeds_to_settle(e, low, high)
    if needed is None:
        return f"more {kind} seeds than {e.seeds}, at least three"
    return f"{plural(max(needed, e.seeds + 1), f'{kind} seed')}: 80 % power, were this the true number"
