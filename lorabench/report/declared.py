"""What the study declared before it ran, in words; what was not declared is said too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabench.config import alpha_rules
from lorabench.results import formatting

if TYPE_CHECKING:
    from lorabench.results.findings import Findings
    from lorabench.results.sweep import Sweep


def anchor(sweep: Sweep) -> str:
    """`r = 8 (s = 2)`: where the alpha rules meet; empty where none is declared."""
    rank = sweep.study.get("alpha_anchor")
    if rank is None:
        return ""
    rules = sorted({c.alpha_rule for c in sweep.cells if c.alpha_rule})
    scales = {f"{rule.scaling(int(rank)):.4g}" for text in rules if (rule := alpha_rules.parse(text))}
    return f"r = {rank}" + (f" (s = {scales.pop()})" if len(scales) == 1 else "")


def margin(f: Findings, *, unit: bool = True) -> str:
    """The margin as every text has it: one that the study did not declare is post hoc."""
    said = f.metric.size(f.sweep.margin, unit=unit)
    return f"{said}, post hoc" if f.sweep.post_hoc is not None else said


def margin_fact(f: Findings) -> str:
    size, declared = f.metric.size(f.sweep.margin), f.sweep.declared_margin
    if f.sweep.other:
        return f"{size} (post hoc)"
    if f.sweep.post_hoc is not None:
        return f"{size} (post hoc; {f'declared: {f.metric.size(declared)}' if declared else 'none was declared'})"
    return f"{size} ({'declared' if declared else 'default'})"


def selection(sweep: Sweep) -> str:
    """`validation loss`: what chooses a rate."""
    return f"validation {formatting.TITLES.get(sweep.selection, sweep.selection.replace('_', ' '))}"


def reference(f: Findings) -> str:
    """Its name, and how it came to be it."""
    if not f.reference:
        return ""
    if f.sweep.study.get("reference") == f.reference:
        how = "declared"
    else:
        how = "the largest rank, as none was declared" if f.results[f.reference].cell.adapter else "none was declared"
    return f"{f.results[f.reference].name} ({how})"


def family(f: Findings) -> str:
    """Which comparisons with the reference share Holm's steps, and how many others there are."""
    own = sum(not made.exploratory for made in f.versus.values())
    if not own:
        return ""
    others = len(f.versus) - own
    said = formatting.plural(own, "comparison") + " with the reference"
    return f"{said} (declared), {others} more exploratory" if others else said


def _instead(sweep: Sweep) -> str:
    """After the name of a metric that is not the declared one."""
    if not sweep.other:
        return ""
    return f" (post hoc; {'declared' if sweep.study.get('metric') else 'the primary one'}: {formatting.TITLES.get(sweep.primary, sweep.primary)})"


def study_facts(f: Findings) -> list[tuple[str, str]]:
    """Name and value of all that a study declares; empty values are left out by who shows them."""
    way = "lower" if f.metric.lower_is_better else "higher"
    return [
        (
            "Primary metric",
            f"{f.metric.title}{_instead(f.sweep)}, {way} is better; rates chosen on {selection(f.sweep)}",
        ),
        ("Margin", margin_fact(f)),
        ("Reference", reference(f) if f.versus else ""),
        ("Family", family(f)),
        ("Alpha anchor", anchor(f.sweep)),
        ("Study hash", str(f.sweep.manifest.get("study_hash") or "")),
    ]


def study_line(f: Findings) -> str:
    """The declaration in one line, for the top of a report."""
    said = {name: value for name, value in study_facts(f) if value}
    study = said.pop("Study hash", "")
    head = f"Declared before it ran (study {study}): " if study else "No study was declared: "
    parts = [said.pop("Primary metric"), *(f"{name.lower()} {value}" for name, value in said.items())]
    return head + "; ".join(parts) + "."
