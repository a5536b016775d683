"""The report on a phone, on paper and for a screen reader: measured in a headless browser, colours from the style sheet too."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures.browser import chromium, measured, needs_browser
from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.report import render

PHONE, PAPER = 360, 688  # CSS pixels; paper: A4 less margins of 14 mm
PAPER_HEIGHT = 1016
HOSTILE = "<script>document.title='owned'</script><img src=http://example.org/x.png>" + "x" * 120

# Every text with its colour on what lies behind it, pictures apart: [ratio, text].
CONTRAST = """
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const light = c => { const f = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(win.getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; }
    return [255, 255, 255, 1]; };
  const low = [];
  for (const e of doc.body.querySelectorAll("*:not(svg *):not(style)")) {
    const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(" ").trim();
    if (!own) continue;
    const [a, b] = [light(parse(win.getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([ratio, own.slice(0, 40)]);
  }
"""
PAGE = (
    CONTRAST
    + """
  const all = (css, of) => [...doc.querySelectorAll(css)].map(of);
  return {
    width: [doc.documentElement.scrollWidth, doc.body.scrollWidth], low, title: doc.title, lang: doc.documentElement.lang,
    resources: win.performance.getEntriesByType("resource").map(r => r.name),
    tables: all("table", t => { const box = t.closest(".scroll"); return [t.className, box.getBoundingClientRect().right, win.getComputedStyle(box).overflowX]; }),
    rows: all(":is(.slopes, .best_rates, .pareto) tr", r => r.getBoundingClientRect().height),
    headings: all("h1, h2, h3, h4", h => Number(h.tagName[1])),
    pictures: all("svg, img", p => p.getAttribute("alt") || (p.getAttribute("aria-hidden") === "true" && "hidden") ||
      (p.getAttribute("role") === "img" && doc.getElementById(p.getAttribute("aria-labelledby")).textContent)),
    heads: all("th", th => th.scope), scripts: doc.scripts.length, ids: all("[id]", e => e.id),
    labels: all("[aria-labelledby]", e => doc.getElementById(e.getAttribute("aria-labelledby")) !== null),
  };
"""
)
WIDE = """
  doc.querySelectorAll("details").forEach(d => d.open = true);
  const right = e => e.getBoundingClientRect().right;
  return {
    width: doc.documentElement.scrollWidth, height: doc.documentElement.scrollHeight,
    cut: [...doc.querySelectorAll("table, .plot svg, pre, dl")].filter(e => right(e) > doc.documentElement.clientWidth + 1).map(e => e.className.baseVal ?? e.className),
    tall: [...doc.querySelectorAll("figure, tr, aside, pre")].map(e => e.getBoundingClientRect().height),
  };
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with everything a page can hold, and with names that are longer and nastier than a page expects."""
    root = tmp_path_factory.mktemp("browser")
    hostile = Planted("lora", (1e-3, 2e-3), 2e-3, 0.7, r=2, label={"targets": HOSTILE, "extra": {"task.name": HOSTILE}})
    build(root / "rank", (*RANK_SWEEP, hostile), name=HOSTILE, study={"question": HOSTILE})
    render(root / "rank", root / "report", margin=0.01)
    return root / "report"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed records: a report as it is, weights and claims included."""
    root = tmp_path_factory.mktemp("reference")
    render(Path(__file__).resolve().parent.parent.parent / "sweeps/ref_rank_sweep", root / "report")
    return root / "report"


def check(found: dict[str, Any]) -> None:
    assert found["width"] == [PHONE, PHONE], "the page scrolls sideways"
    assert found["tables"]
    for name, right, overflow in found["tables"]:
        assert right <= PHONE and overflow == "auto", f"table {name} does not scroll in a box of its own"
    assert max(found["rows"]) < 160, "a column so narrow that its words stand one below the other"
    assert found["resources"] == [], "something outside the file was asked for"
    assert found["lang"] == "en"
    assert found["scripts"] == 0 and found["title"] != "owned"
    assert found["headings"][0] == 1 and found["headings"].count(1) == 1
    assert all(b <= a + 1 for a, b in zip(found["headings"], found["headings"][1:], strict=False)), (
        "a level is left out"
    )
    assert all(found["pictures"]), "a picture without a text"
    assert set(found["heads"]) == {"col", "row"}
    assert len(found["ids"]) == len(set(found["ids"]))
    assert all(found["labels"])
    assert found["low"] == [], "texts of a contrast below 4.5"


@needs_browser
@pytest.mark.slow
def test_on_a_phone_and_for_a_screen_reader(report: Path, reference: Path) -> None:
    for folder in (report, reference):
        check(measured(folder / "report.html", PAGE, width=PHONE))


@needs_browser
@pytest.mark.slow
def test_on_paper_nothing_is_cut(report: Path, reference: Path) -> None:
    """The print rules on a screen as wide as the paper's text; then the PDF itself, page by page."""
    for folder in (report, reference):
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert text.count("@media print") == 1
        printed = folder / "printed.html"
        printed.write_text(text.replace("@media print", "@media all"), encoding="utf-8")
        found = measured(printed, WIDE, width=PAPER)
        assert found["cut"] == [] and found["width"] <= PAPER
        assert max(found["tall"]) < PAPER_HEIGHT, "taller than a page: it would be cut whatever the rules say"
        chromium(
            folder,
            "--no-pdf-header-footer",
            f"--print-to-pdf={folder / 'report.pdf'}",
            (folder / "report.html").as_uri(),
        )
        pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", (folder / "report.pdf").read_bytes()))
        assert found["height"] / PAPER_HEIGHT - 1 <= pages <= 2 * found["height"] / PAPER_HEIGHT + 2


# -- without a browser -----------------------------------------------------------------------------------------------

PAIRS = [
    (text, back) for text in ("ink", "soft", "accent", "good", "bad") for back in ("paper", "tint", "mark", "warn")
]


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of `#rgb` or `#rrggbb`."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_palette_of_the_style_sheet_has_contrast(repo: Path) -> None:
    css = (repo / "lorabench/report/templates/page.css").read_text(encoding="utf-8")
    palettes = [
        dict(re.findall(r"--([\w-]+):\s*(#[0-9a-fA-F]+)", body)) for body in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(palettes) == 3  # light, dark, paper
    for palette in palettes:
        colours = {**palettes[0], **palette}
        for text, back in PAIRS:
            a, b = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
            assert (a + 0.05) / (b + 0.05) >= 4.5, (text, colours[text], back, colours[back])
    outside = re.sub(r":root \{.*?\}", "", css, flags=re.S)
    assert set(re.findall(r"(?<!-)color:\s*([^;]+);", outside)) <= {f"var(--{name})" for name, _ in PAIRS}, (
        "a colour of no palette"
    )


def test_a_page_asks_for_nothing_and_keeps_texts_texts(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "<link" not in text and "@import" not in text
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', text)) == set()
    assert set(re.findall(r"url\(([^#)][^)]*)\)", text)) == set()
    assert "&lt;script&gt;" in text
    shutil.rmtree(report / "profile", ignore_errors=True)
