"""From an analysis file to rows and pictures: means by hand, what is missing, what a picture says."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.sweeps import RANK_SWEEP, build
from lorabench.config.errors import ConfigError
from lorabench.report import render, theme
from lorabench.report.sections import weights
from lorabench.results.sweep import load
from lorabench.results.weights import parse, read_analysis

CELLS = {"lora-r4-a16-all-linear": 4, "lora-r16-a16-all-linear": 16, "full-everything": None}
SMALL, LARGE, FULL = CELLS
IDS = {cell: [f"{k}{seed}".ljust(12, "0") for seed in (0, 1)] for k, cell in enumerate(CELLS)}


def layer(r: int | None, scale: float, **changes: Any) -> dict[str, Any]:
    n = r or 20
    values = [scale * 2.0**-k for k in range(n)]
    return {
        "shape": [32, 32],
        "r": r,
        "norm": float(np.linalg.norm(values)),
        "weight_norm": 10.0,
        "relative_norm": scale,
        "stable_rank": 1.5,
        "effective_rank": 2.5,
        "variance_rank": 2,
        "directions": n,
        "amplification": 4.0,
        "projected": 1.0,
        "projected_own": 5.0,
        "projected_random": 0.5,
        "singular_values": values,
        "intruders": {"0.3": 0, "0.5": 2, "0.9": 4},
        **changes,
    }


def grid(n: int, m: int, value: float) -> list[list[float]]:
    return [[value / (1 + abs(i - j)) for j in range(m)] for i in range(n)]


def similarity(kind: str, of: str, a: str, b: str) -> dict[str, Any]:
    i, j = ([1, 2, 3, 4][: CELLS[x]] if CELLS[x] == 4 else [*range(1, 9), 10, 12, 16] for x in (a, b))
    return {
        "kind": kind,
        "of": of,
        "cells": [a, b],
        "runs": [[IDS[a][0], IDS[b][1]]],
        "i": i,
        "j": j,
        "phi": grid(len(i), len(j), 0.8),
        "start": grid(len(i), len(j), 0.1) if of == "A" else None,
        "inverse_width": 1 / 32,
        "layers": {},
    }


@pytest.fixture
def doc() -> dict[str, Any]:
    """Two ranks and full fine-tuning with two seeds, layers q and v; the order of cells is not that of their names."""
    cells, runs = {}, {}
    for order, (cell, r) in enumerate(CELLS.items()):
        name = f"LoRA r = {r}" if r else "full fine-tuning"
        cells[cell] = {
            "order": order,
            "name": name,
            "method": "LoRA" if r else "full",
            "r": r,
            "alpha": 16.0 if r else None,
            "targets": "all-linear",
            "role": "confirm",
            "lr": 1e-3,
            "runs": IDS[cell],
        }
        for seed, run in enumerate(IDS[cell]):
            layers = {"q": layer(r, 0.1 + 0.1 * seed), "v": layer(r, 0.3 + 0.1 * seed)}
            runs[run] = {
                "weights": "0" * 16,
                "seed": seed,
                "lr": 1e-3,
                "intruders": True,
                "layers": layers,
                "left_out": {},
            }
    pairs = [("seeds", SMALL, SMALL), ("seeds", LARGE, LARGE), ("ranks", SMALL, LARGE)]
    found = [similarity(kind, of, a, b) for kind, a, b in pairs for of in ("A", "dW")]
    return {"schema": 1, "cells": cells, "runs": runs, "similarity": found, "left_out": {}, "notes": []}


def tidy(doc: dict[str, Any]) -> weights.Weights:
    return weights.tidy_rows(parse(doc))


def looks(tmp_path: Path) -> dict[str, theme.Look]:
    return theme.looks(load(build(tmp_path / "s", RANK_SWEEP).root).cells)


class TestRows:
    def test_means_over_layers_then_seeds(self, doc: dict[str, Any]) -> None:
        found = tidy(doc).cells[0]
        assert (found.id, found.r, found.layers, found.runs) == (SMALL, 4, 2, tuple(IDS[SMALL]))
        assert found.measures["relative_norm"].mean == pytest.approx(0.25)  # .2 and .3
        assert found.measures["relative_norm"].sd == pytest.approx(np.std([0.2, 0.3], ddof=1))
        assert found.intruders[0.5].mean == 2 and list(found.intruders) == [0.3, 0.5, 0.9]

    def test_one_vast_amplification_does_not_speak_for_all_layers(self, doc: dict[str, Any]) -> None:
        for run in IDS[SMALL]:
            doc["runs"][run]["layers"]["k"] = layer(4, 0.1, amplification=1e6)
        assert tidy(doc).cells[0].measures["amplification"].mean == 4.0

    def test_cells_in_the_order_of_the_report(self, doc: dict[str, Any]) -> None:
        doc["cells"] = dict(sorted(doc["cells"].items()))
        assert [c.id for c in tidy(doc).cells] == list(CELLS)

    def test_missing_measures_are_left_out_of_the_mean(self, doc: dict[str, Any]) -> None:
        first, second = IDS[SMALL]
        doc["runs"][first]["layers"]["q"]["stable_rank"] = None
        doc["runs"][first]["layers"]["v"]["stable_rank"] = 3.0
        for run in (first, second):
            for x in doc["runs"][run]["layers"].values():
                x["intruders"], x["amplification"] = None, None
        found = tidy(doc).cells[0]
        assert found.measures["stable_rank"].mean == pytest.approx((3.0 + 1.5) / 2)
        assert "amplification" not in found.measures and found.intruders == {}
        texts = dict(
            zip(
                (c.key for c in weights.table(tidy(doc)).columns),
                weights.table(tidy(doc)).rows[0].texts,
            )
        )
        assert texts["amplification"] == texts["intruders"] == "–" and texts["stable_rank"] == "2.25"

    def test_one_seed_has_no_spread(self, doc: dict[str, Any]) -> None:
        del doc["runs"][IDS[SMALL][1]]
        found = tidy(doc).cells[0]
        assert found.measures["relative_norm"] == weights.Mean(pytest.approx(0.2), None) and found.runs == (
            IDS[SMALL][0],
        )

    def test_layers(self, doc: dict[str, Any]) -> None:
        rows = [x for x in tidy(doc).layers if x.cell == LARGE]
        assert [(x.run, x.layer) for x in rows] == [(run, name) for run in IDS[LARGE] for name in ("q", "v")]
        assert rows[3].measures["relative_norm"] == 0.4 and rows[3].intruders == {0.3: 0, 0.5: 2, 0.9: 4}

    def test_similarity_and_its_baseline(self, doc: dict[str, Any]) -> None:
        s = next(s for s in tidy(doc).similarities if s.kind == "ranks" and s.of == "A")
        assert s.names == ("LoRA r = 4", "LoRA r = 16") and s.runs == ((IDS[SMALL][0], IDS[LARGE][1]),)
        assert s.phi.shape == s.random.shape == (len(s.i), len(s.j)) == (4, 11)
        assert s.random[0, 0] == 1 / 32 and s.random[3, 10] == 16 / 32 and s.random[3, 1] == 4 / 32
        assert s.start is not None and s.start[0, 0] == 0.1

    def test_spectra_are_shares_of_the_weight(self, doc: dict[str, Any]) -> None:
        s = tidy(doc).spectra[1]
        assert (s.cell, len(s.median)) == (LARGE, 16)
        assert s.median[0] == pytest.approx(0.025) and s.low[0] == pytest.approx(
            np.quantile([0.01, 0.02, 0.03, 0.04], 0.25)
        )
        assert s.median[3] == pytest.approx(0.025 / 8)

    def test_zero_updates_have_no_spectrum(self, doc: dict[str, Any]) -> None:
        for run in IDS[SMALL]:
            for x in doc["runs"][run]["layers"].values():
                x["norm"], x["singular_values"] = 0.0, [0.0] * 4
        assert [s.cell for s in tidy(doc).spectra] == [LARGE, FULL]

    def test_what_was_left_out_is_said(self, doc: dict[str, Any]) -> None:
        gone = IDS[FULL][0]
        del doc["runs"][gone]
        doc["left_out"][gone] = "a run with weights"
        doc["runs"][IDS[SMALL][0]]["left_out"] = {"conv": "a convolution with groups"}
        doc["notes"] = ["A note."]
        said = tidy(doc)
        assert said.left_out[1] == "full fine-tuning: 1 of 2 runs not analysed, as this asks for a run with weights"
        assert said.left_out[0] == f"LoRA r = 4: conv of run {IDS[SMALL][0]} not analysed: a convolution with groups"
        assert set(weights.table(said).notes) >= {"A note.", *said.left_out}

    def test_a_cell_without_any_run_has_no_row(self, doc: dict[str, Any]) -> None:
        for run in IDS[FULL]:
            del doc["runs"][run]
        assert [c.id for c in tidy(doc).cells] == [SMALL, LARGE]

    def test_the_table(self, doc: dict[str, Any]) -> None:
        doc["cells"][FULL]["role"] = "tune"
        table = weights.table(tidy(doc))
        assert table.rows[0].texts == ("LoRA r = 4", "2", "0.2500", "1.50", "2.50", "2.0", "2.00", "4.00")
        assert table.rows[0].runs == tuple(IDS[SMALL])
        assert len(table.columns) == len(table.rows[0].texts)
        assert any("tuning runs" in note for note in table.notes)


class TestFile:
    def write(self, root: Path, text: str) -> Path:
        path = root / "analysis" / "weights.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return root

    def test_none_where_nothing_was_analysed(self, tmp_path: Path) -> None:
        assert read_analysis(tmp_path) is None

    def test_as_it_was_written(self, tmp_path: Path, doc: dict[str, Any]) -> None:
        assert read_analysis(self.write(tmp_path, json.dumps(doc))) == parse(doc)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "cells": {"a": 1}}', "\x00"]
    )
    def test_torn_and_foreign_files(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match="weights.json"):
            read_analysis(self.write(tmp_path, text))


class TestFigures:
    def test_both_with_words_and_without_a_date(self, tmp_path: Path, doc: dict[str, Any]) -> None:
        drawn = weights.draw(tidy(doc), looks(tmp_path))
        assert [d.key for d in drawn] == ["subspaces", "spectra"]
        for d in drawn:
            assert len(d.alt) > 40 and d.caption and "<dc:date>" not in d.svg and b"Software" not in d.png
            assert theme.inline_svg(d).startswith("<svg")
        assert "LoRA r = 4 and LoRA r = 16 at different seeds" in drawn[0].alt
        assert "A after training φ(1, 1) = 0.80" in drawn[0].alt and "A before training φ(1, 1) = 0.10" in drawn[0].alt
        assert "0.031 at (1, 1) and 0.50 at (4, 16)" in drawn[0].caption

    def test_equal_data_give_equal_pictures(self, tmp_path: Path, doc: dict[str, Any]) -> None:
        found = looks(tmp_path)
        first, second = (weights.draw(tidy(copy.deepcopy(doc)), found) for _ in range(2))
        assert first == second

    def test_which_comparison_tells_most(self, doc: dict[str, Any]) -> None:
        def pick(*found: tuple[str, int, int]) -> tuple[str, int, int]:
            entries = []
            for kind, n, m in found:
                x = similarity(kind, "A", SMALL, LARGE)
                x |= {
                    "i": list(range(1, n + 1)),
                    "j": list(range(1, m + 1)),
                    "phi": grid(n, m, 1),
                    "start": None,
                    "cells": [SMALL, LARGE],
                }
                s = weights.similarity(x, parse(doc).cells)
                entries.append(dataclasses.replace(s, cells=(f"{n}", f"{m}")))
            s = weights.shown_similarities(entries)[0]
            return s.kind, s.i[-1], s.j[-1]

        assert pick(("seeds", 64, 64), ("ranks", 1, 64), ("ranks", 16, 64), ("ranks", 32, 64)) == ("ranks", 16, 64)
        assert pick(("ranks", 8, 16), ("ranks", 12, 16)) == ("ranks", 8, 16)
        assert pick(("seeds", 4, 4), ("seeds", 64, 64)) == ("seeds", 64, 64)
        assert weights.shown_similarities([]) == []

    def test_with_less_to_show(self, tmp_path: Path, doc: dict[str, Any]) -> None:
        """Seeds alone, dW alone, one direction, nothing."""
        found = looks(tmp_path)
        doc["similarity"] = [similarity("seeds", "dW", SMALL, SMALL)]
        (subspaces, _) = weights.draw(tidy(doc), found)
        assert subspaces.caption.startswith("Seeds of LoRA r = 4: ") and "ΔW φ(1, 1)" in subspaces.alt
        one = doc["similarity"][0]
        one |= {"i": [1], "j": [1], "phi": [[0.5]]}
        for run in doc["runs"].values():
            for x in run["layers"].values():
                x["singular_values"] = x["singular_values"][:1]
        assert len(weights.draw(tidy(doc), found)) == 2
        assert weights.draw(tidy({**doc, "cells": {}, "similarity": []}), found) == []

    def test_what_rounding_left_of_a_zero_is_not_drawn(self, tmp_path: Path, doc: dict[str, Any]) -> None:
        for run in IDS[LARGE]:
            for x in doc["runs"][run]["layers"].values():
                x["singular_values"][8:] = [1e-17] * 8
        spectrum = tidy(doc).spectra[1]
        with theme.canvas(3, 3) as figure:
            ax = figure.add_subplot()
            x, y, name, _ = weights.draw_spectrum(ax, spectrum, looks(tmp_path)[LARGE])
        assert (x, name) == (8, "LoRA r = 16") and y == pytest.approx(np.log10(0.025 * 2.0**-7))
        assert list(ax.lines[0].get_xdata()) == list(range(1, 9))


def test_rows_and_pictures_need_no_torch() -> None:
    code = "import sys, lorabench.report.sections.weights, lorabench.results.weights\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_analysis_joins_the_report(doc: dict[str, Any], tmp_path: Path) -> None:
    path = build(tmp_path / "s", RANK_SWEEP).root / "analysis" / "weights.json"
    path.parent.mkdir()
    path.write_text(json.dumps(doc))
    render(tmp_path / "s", tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "What training added to the weights" in page and 'id="spectra"' in page and 'id="subspaces"' in page
    assert (tmp_path / "r" / "figures" / "spectra.svg").is_file() and (
        tmp_path / "r" / "tables" / "weights.tex"
    ).is_file()
