"""What the study declared before it ran, in words; what was not declared is said too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabench.config import alpha_rules
from lorabench.results import formatting

if TYPE_CHECKING:
    from lorabench.results.findings import Findings
    from lorabench.results.sweep import Sweep


def anchor(sweep: Sweep) -> str:
    """Return where the alpha rules meet, such as `r = 8 (s = 2)`; empty where none is declared."""
    rank = sweep.study.get("alpha_anchor")
    if rank is None:
        return ""
    rules = sorted({c.alpha_rule for c in sweep.cells if c.alpha_rule})
    scales = {f"{rule.scaling(int(rank)):.4g}" for text in rules if (rule := alpha_rules.parse(text))}
    return f"r = {rank}" + (f" (s = {scales.pop()})" if len(scales) == 1 else "")


def margin(f: Findings, *, unit: bool = True) -> str:
    """Return the margin as every text has it: one that the study did not declare is post hoc."""
    size = f.metric.size(f.sweep.margin, unit=unit)
    return f"{size}, post hoc" if f.sweep.post_hoc is not None else size


def margin_fact(f: Findings) -> str:
    """Return the margin and where it comes from, such as `2.0 points (declared)`."""
    size, declared = f.metric.size(f.sweep.margin), f.sweep.declared_margin
    if f.sweep.other:
        return f"{size} (post hoc)"
    if f.sweep.post_hoc is not None:
        instead_of = f"declared: {f.metric.size(declared)}" if declared else "none was declared"
        return f"{size} (post hoc; {instead_of})"
    return f"{size} ({'declared' if declared else 'default'})"


def selection(sweep: Sweep) -> str:
    """Return what chooses a rate, such as `validation loss`."""
    return f"validation {formatting.TITLES.get(sweep.selection, sweep.selection.replace('_', ' '))}"


def reference(f: Findings) -> str:
    """Return the reference's name, and how it came to be the reference."""
    if not f.reference:
        return ""
    if f.sweep.study.get("reference") == f.reference:
        how = "declared"
    else:
        adapter = f.results[f.reference].cell.adapter
        main = "the largest of the main method by trainable parameters, as none was declared"
        how = main if adapter else "none was declared"
    return f"{f.results[f.reference].name} ({how})"


def family(f: Findings) -> str:
    """Return how many comparisons with the reference share Holm's steps, and how many others there are."""
    size = sum(not comparison.exploratory for comparison in f.versus.values())
    if not size:
        return ""
    others = len(f.versus) - size
    text = formatting.plural(size, "comparison") + " with the reference"
    return f"{text} (declared), {others} more exploratory" if others else text


def _primary_metric(f: Findings) -> str:
    direction = "lower" if f.metric.lower_is_better else "higher"
    post_hoc = ""
    if f.sweep.other:
        which = "declared" if f.sweep.study.get("metric") else "the primary one"
        post_hoc = f" (post hoc; {which}: {formatting.TITLES.get(f.sweep.primary, f.sweep.primary)})"
    return f"{f.metric.title}{post_hoc}, {direction} is better; rates chosen on {selection(f.sweep)}"


def study_facts(f: Findings) -> list[tuple[str, str]]:
    """Return name and value of all that a study declares; who shows them leaves empty values out."""
    return [
        ("Primary metric", _primary_metric(f)),
        ("Margin", margin_fact(f)),
        ("Reference", reference(f) if f.versus else ""),
        ("Family", family(f)),
        ("Alpha anchor", anchor(f.sweep)),
        ("Study hash", str(f.sweep.manifest.get("study_hash") or "")),
    ]


def study_line(f: Findings) -> str:
    """Return the declaration in one line, for the top of a report."""
    facts = {name: value for name, value in study_facts(f) if value}
    study_hash = facts.pop("Study hash", "")
    head = f"Declared before it ran (study {study_hash}): " if study_hash else "No study was declared: "
    parts = [facts.pop("Primary metric"), *(f"{name.lower()} {value}" for name, value in facts.items())]
    return head + "; ".join(parts) + "."
