"""`python -m lorabench.analyze` on run directories made by hand: its numbers against dense float64 numpy, resume, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.adapters import base
from fixtures.runs import make_base, make_data
from fixtures.weights import Made, refused
from lorabench.adapters.files import save_slice
from lorabench.adapters.merge import merge
from lorabench.analyze import __main__ as face
from lorabench.analyze import deltas, measurement
from lorabench.analyze.scope import WeightsRequest
from lorabench.analyze.updates import LayerUpdate
from lorabench.config.contracts.method import AdapterSpec, SlicePlan
from lorabench.training.saved_run import SavedRun

QUERY = "bert.encoder.layer.0.attention.self.query"
LORA = {"method.target_modules": ["query", "value"], "method.alpha": 8.0}
CELLS: dict[str, dict[str, Any]] = {
    "r2": {**LORA, "method.r": 2},
    "r4": {**LORA, "method.r": 4},
    "full": {"method.name": "full"},
    "head": {"method.name": "head"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")
    return lambda kind: root / kind if (root / kind).exists() else make_base(root / kind, kind)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Path]) -> Made:
    """r = 2 and 4 with three seeds, full with two, head with one."""
    root = tmp_path_factory.mktemp("original")
    made = Made(root / "sweep", bases("bert"), make_data(root / "data.csv"))
    for cell, settings in CELLS.items():
        for seed in {"full": (0, 1), "head": (0,)}.get(cell, (0, 1, 2)):
            made.add(cell, seed, settings)
    return made


@pytest.fixture
def sweep(original: Made, tmp_path: Path) -> Made:
    """A copy to work on."""
    copied = Made(shutil.copytree(original.root, tmp_path / "sweep"), original.base, original.data)
    for name in ("ids", "states", "starts", "runs"):
        setattr(copied, name, dict(getattr(original, name)))
    return copied


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """run_ids in the order they are measured."""
    seen: list[str] = []
    real = deltas.measure_run

    def measure(opened: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(opened.run_id)
        return real(opened, *args, **kwargs)

    monkeypatch.setattr(deltas, "measure_run", measure)
    return seen


def variant(method: str, kind: str) -> dict[str, Any]:
    """A wide and a narrow side, and for IA3 both kinds of scaling."""
    targets = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"]}[kind]
    more: dict[str, Any] = {
        "dora": {"r": 4, "alpha": 8.0},
        "vera": {"r": 6},
        "pissa": {"r": 2, "alpha": 2.0},
        "ia3": {},
    }[method]
    if method == "ia3":
        more = {"feedforward_modules": ["intermediate.dense"] if kind == "bert" else ["c_fc"]}
    return {"method.name": method, "method.target_modules": targets, **{f"method.{k}": v for k, v in more.items()}}


def merged(made: Made, run_id: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The base's weights in float64 before and after a run is merged into them."""
    saved = deltas.open_trained_run(made.store.run_dir(run_id)).saved
    model = saved.base(dtype="float64").model
    before = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    merge(model, *saved.weights())
    return before, {name: t.numpy() for name, t in model.state_dict().items()}


def intruders(W: np.ndarray, tuned: np.ndarray, threshold: float) -> int:
    cosines = np.abs(np.linalg.svd(tuned)[0][:, :10].T @ np.linalg.svd(W)[0]).max(1)
    return int((cosines < threshold).sum())


class TestNumbers:
    @pytest.mark.parametrize(("cell", "scaling", "directions"), [("r2", 4.0, 2), ("r4", 2.0, 4), ("full", 0.0, None)])
    def test_against_dense_numpy(self, sweep: Made, cell: str, scaling: float, directions: int | None) -> None:
        doc = measurement.measure_weights(sweep.root, WeightsRequest())
        run = sweep.ids[cell, 1]
        x = doc["runs"][run]["layers"][QUERY]
        W, dW = sweep.weight(QUERY), sweep.dW(run, QUERY, scaling)
        U, S, Vh = np.linalg.svd(dW)
        n = directions or int(np.searchsorted(np.cumsum(S**2), 0.9 * np.sum(S**2))) + 1
        p = S / S.sum()
        expected = {
            "norm": np.linalg.norm(dW), "weight_norm": np.linalg.norm(W), "relative_norm": np.linalg.norm(dW) / np.linalg.norm(W),
            "stable_rank": np.sum(S**2) / S[0] ** 2, "effective_rank": np.exp(-np.sum(p[p > 1e-12] * np.log(p[p > 1e-12]))),
            "projected": np.linalg.norm(U[:, :n].T @ W @ Vh[:n].T), "projected_random": np.linalg.norm(W) * n / 32,
            "projected_own": np.linalg.norm(np.linalg.svd(W)[1][:n]),
        }  # fmt: skip
        expected["amplification"] = expected["norm"] / expected["projected"]
        assert {key: x[key] for key in expected} == pytest.approx(expected, rel=2e-5)
        assert x["variance_rank"] == int(np.searchsorted(np.cumsum(S**2), 0.9 * np.sum(S**2))) + 1
        assert (x["shape"], x["r"], x["directions"]) == ([32, 32], directions, n)
        assert x["singular_values"] == pytest.approx(S[: directions or 32].tolist(), rel=2e-5, abs=1e-6)
        assert x["intruders"] == {f"{t:g}": intruders(W, W + dW, t) for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}

    def test_something_intrudes(self, sweep: Made) -> None:
        """Or the counts above would agree on nothing."""
        doc = measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",)))
        assert sum(x["intruders"]["0.9"] for run in doc["runs"].values() for x in run["layers"].values()) > 0

    def test_layers_held_the_other_way_round(self, tmp_path: Path, bases: Callable[[str], Path]) -> None:
        """transformers' Conv1D and an embedding: dW, W and the left side of the intruders are of the map x -> W x."""
        made = Made(tmp_path / "sweep", bases("gpt2"), make_data(tmp_path / "data.csv"))
        made.add("mixed", 0, {"method.target_modules": ["c_attn", "wte"], "method.r": 2, "method.alpha": 2.0})
        run = made.ids["mixed", 0]
        doc = measurement.measure_weights(made.root, WeightsRequest())
        for layer in ("transformer.h.1.attn.c_attn", "transformer.wte"):
            x, W, dW = doc["runs"][run]["layers"][layer], made.weight(layer).T, made.dW(run, layer, 1.0)
            assert x["shape"] == list(W.shape) == list(dW.shape)
            s = np.linalg.svd(dW, compute_uv=False)
            assert x["singular_values"] == pytest.approx(s[:2].tolist(), rel=2e-5)
            own, tuned = np.linalg.svd(W, full_matrices=False)[0], np.linalg.svd(W + dW, full_matrices=False)[0]
            cosines = np.abs(tuned[:, :10].T @ own).max(1)
            assert x["intruders"]["0.9"] == int((cosines < 0.9).sum())
            assert x["relative_norm"] == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(W), rel=2e-5)

    def test_full_alone_is_measured_on_its_linear_layers(self, tmp_path: Path, bases: Callable[[str], Path]) -> None:
        made = Made(tmp_path / "sweep", bases("bert"), make_data(tmp_path / "data.csv"))
        made.add("full", 0, CELLS["full"])
        layers = measurement.measure_weights(made.root, WeightsRequest(intruders=False))["runs"][made.ids["full", 0]][
            "layers"
        ]
        parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")  # fmt: skip
        assert set(layers) >= {f"bert.encoder.layer.{k}.{part}" for k in (0, 1) for part in parts}
        assert not any("classifier" in name or "embeddings" in name for name in layers)
        assert all(x["intruders"] is None and x["projected_own"] is None for x in layers.values())

    def test_full_fine_tuning_of_tied_weights(self) -> None:
        """The state holds them once, whichever of the two layers is asked about."""
        frozen = deltas.FrozenWeights(base("gpt2"))
        state = {name: p + 0.5 for name, p in frozen.model.named_parameters()}
        opened: Any = SimpleNamespace(plan=SlicePlan(seed=0, full=True))
        for name in ("lm_head", "transformer.wte"):
            found = deltas.layer_update(opened, state, name, frozen)
            assert torch.allclose(found.tensors["weight"], frozen.weight(name) + 0.5)

    def test_an_adapter_that_learned_nothing(self, sweep: Made) -> None:
        run = sweep.ids["r2", 0]
        folder, run_config = sweep.store.run_dir(run) / "adapter", sweep.runs[run]
        state, plan = deltas.open_trained_run(folder.parent).saved.weights()
        zero = {k: t * 0 if k.endswith("lora_B") else t for k, t in state.items()}
        info = run_config.model.info(deltas.open_trained_run(folder.parent).saved.head)
        save_slice(folder, zero, plan, info=info, run=run_config.to_dict())
        doc = measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",)))
        x = doc["runs"][run]["layers"][QUERY]
        assert x["stable_rank"] is x["effective_rank"] is x["amplification"] is None
        assert (x["norm"], x["variance_rank"], x["intruders"]["0.9"]) == (0, 0, 0)
        assert all(np.isfinite(s["phi"]).all() for s in doc["similarity"])


class TestVariants:
    """DoRA, VeRA, IA3 and PiSSA against the merged base: merging and measuring share no formula."""

    @pytest.mark.parametrize("kind", ["bert", "gpt2"])
    @pytest.mark.parametrize("method", ["dora", "vera", "ia3", "pissa"])
    def test_against_merged_minus_base(
        self, tmp_path: Path, bases: Callable[[str], Path], method: str, kind: str
    ) -> None:
        made = Made(tmp_path / "sweep", bases(kind), make_data(tmp_path / "data.csv"))
        for seed in (0, 1):
            made.add(method, seed, variant(method, kind))
        doc = measurement.measure_weights(made.root, WeightsRequest())
        run = made.ids[method, 1]
        layers = doc["runs"][run]["layers"]
        assert not doc["runs"][run]["left_out"] and len(layers) >= 4
        assert len({x["kind"] for x in layers.values()}) == (2 if method == "ia3" else 1)
        before, after = merged(made, run)
        for name, x in layers.items():
            turn = (lambda m: m.T) if kind == "gpt2" else (lambda m: m)
            W, tuned = turn(before[f"{name}.weight"]), turn(after[f"{name}.weight"])
            dW = tuned - W
            U, S, Vh = np.linalg.svd(dW)
            ninety = int(np.searchsorted(np.cumsum(S**2), 0.9 * np.sum(S**2))) + 1
            n = {"vera": min(6, *W.shape), "pissa": 4}.get(method, ninety)
            p = S[: np.linalg.matrix_rank(dW, tol=1e-9 * float(S[0]))]
            p = p / p.sum()
            size, old = np.linalg.norm(tuned, axis=1), np.linalg.norm(W, axis=1)
            expected = {
                "norm": np.linalg.norm(dW), "relative_norm": np.linalg.norm(dW) / np.linalg.norm(W), "stable_rank": np.sum(S**2) / S[0] ** 2,
                "effective_rank": np.exp(-np.sum(p * np.log(p))), "variance_rank": ninety, "directions": n,
                "projected": np.linalg.norm(U[:, :n].T @ W @ Vh[:n].T), "magnitude": np.mean(np.abs(size / old - 1)),
                "direction": np.mean(1 - np.sum(W * tuned, 1) / (size * old)),
            }  # fmt: skip
            assert {key: x[key] for key in expected} == pytest.approx(expected, rel=2e-5, abs=1e-9), name
            assert x["singular_values"] == pytest.approx(S[: len(x["singular_values"])].tolist(), rel=2e-5, abs=1e-6)
            assert x["r"] == {"dora": 4, "vera": 6, "ia3": None, "pissa": 4}[method]
            own, leading = np.linalg.svd(W)[0], np.linalg.svd(tuned)[0][:, :10]
            assert x["intruders"]["0.9"] == int((np.abs(leading.T @ own[:, : min(W.shape)]).max(1) < 0.9).sum())

    def test_what_is_compared(self, tmp_path: Path, bases: Callable[[str], Path]) -> None:
        """A where it trained from a draw; VeRA's directions lie in A's rows, which all runs share."""
        made = Made(tmp_path / "sweep", bases("bert"), make_data(tmp_path / "data.csv"))
        for method in ("dora", "vera", "ia3", "pissa"):
            for seed in (0, 1):
                made.add(method, seed, variant(method, "bert"))
        doc = measurement.measure_weights(made.root, WeightsRequest(intruders=False))
        found = {(s["cells"][0], s["of"]): s for s in doc["similarity"]}
        assert set(found) == {("dora", "A"), *((method, "dW") for method in ("dora", "vera", "ia3", "pissa"))}
        assert found["dora", "A"]["start"] is not None
        assert found["vera", "dW"]["phi"][-1][-1] == pytest.approx(1, abs=1e-6)
        assert found["vera", "dW"]["phi"][0][0] < 0.999
        pairs = [merged(made, made.ids["ia3", seed]) for seed in (0, 1)]
        first = []
        for name in found["ia3", "dW"]["layers"]:
            V = [np.linalg.svd(new[f"{name}.weight"] - old[f"{name}.weight"])[2][0] for old, new in pairs]
            first.append(float(V[0] @ V[1]) ** 2)
        assert found["ia3", "dW"]["phi"][0][0] == pytest.approx(np.mean(first), rel=1e-4)

    def test_the_table_says_what_it_means(self, tmp_path: Path, bases: Callable[[str], Path], capsys: Any) -> None:
        made = Made(tmp_path / "sweep", bases("bert"), make_data(tmp_path / "data.csv"))
        for method in ("dora", "vera", "ia3"):
            made.add(method, 0, variant(method, "bert"))
        assert face.main([str(made.root), "--no-intruders"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "not analysed" not in out
        for said in ("ΔW = m (W + s B A)", "ΔW = diag(b) B diag(d) A", "ΔW = diag(l − 1) W", "Δ row norm"):
            assert said in out, said

    def test_weights_of_another_base(self, tmp_path: Path, bases: Callable[[str], Path]) -> None:
        for spec, own in (("dora", {"lora_A": (4, 32), "lora_B": (32, 4), "magnitude": (31,)}),
                          ("ia3_input", {"ia3_l": (31,)}), ("vera", {"vera_lambda_d": (4,), "vera_lambda_b": (31,)})):  # fmt: skip
            made = LayerUpdate(
                AdapterSpec(4, 1.0, 4.0, kind=spec), {key: torch.ones(size) for key, size in own.items()}
            )
            assert not made.fits(32, 32) and made.is_finite()
        assert LayerUpdate(AdapterSpec(1, 1.0, 1.0, kind="ia3_input"), {"ia3_l": torch.ones(32)}).fits(48, 32)

    def test_rows_that_hardly_turned(self) -> None:
        """1 - cos of a change of 1e-7 is 5e-15: taken as a difference of float64 it would be mostly rounding."""
        W, added = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1e-7]]).double()
        spec = AdapterSpec(1, 1.0, 1.0)
        found = LayerUpdate(spec, {"lora_A": added, "lora_B": torch.ones(1, 1)}).row_changes(W)
        assert found == (pytest.approx(0, abs=1e-14), pytest.approx(5e-15, rel=1e-6))
        assert LayerUpdate(None, {"weight": W + added}).row_changes(W)[1] == pytest.approx(5e-15, rel=1e-6)
        assert LayerUpdate(None, {"weight": -2 * W}).row_changes(W) == (pytest.approx(1), pytest.approx(2))


class TestSimilarity:
    def test_which_runs_are_compared(self, sweep: Made) -> None:
        doc = measurement.measure_weights(sweep.root, WeightsRequest())
        seeds = {i: r.seed for i, r in sweep.runs.items()}
        found = {(s["kind"], *s["cells"], s["of"]): s["runs"] for s in doc["similarity"]}
        assert set(found) == {
            *(("seeds", cell, cell, of) for cell in ("r2", "r4") for of in ("A", "dW")), ("seeds", "full", "full", "dW"),
            ("ranks", "r2", "r4", "A"), ("ranks", "r2", "r4", "dW"),
        }  # fmt: skip
        assert all(seeds[a] != seeds[b] for runs in found.values() for a, b in runs)
        assert [(seeds[a], seeds[b]) for a, b in found["seeds", "r2", "r2", "A"]] == [(0, 1), (1, 2), (0, 2)]
        assert [(seeds[a], seeds[b]) for a, b in found["ranks", "r2", "r4", "A"]] == [(0, 1), (1, 2), (2, 0)]

    def test_against_dense_numpy(self, sweep: Made) -> None:
        """The mean over layers and pairs of phi of A, of A's start as the stack drew it, and of dW."""
        doc = measurement.measure_weights(sweep.root, WeightsRequest())
        layers = list(doc["runs"][sweep.ids["r2", 0]]["layers"])
        assert len(layers) == 4

        def phi(a: np.ndarray, b: np.ndarray, i: int, j: int) -> float:
            V, other = np.linalg.svd(a)[2][:i], np.linalg.svd(b)[2][:j]
            return float(np.linalg.norm(V @ other.T) ** 2 / min(i, j))

        for of in ("A", "dW"):
            s = next(s for s in doc["similarity"] if s["kind"] == "ranks" and s["of"] == of)
            assert (s["i"], s["j"], s["inverse_width"]) == ([1, 2], [1, 2, 3, 4], 1 / 32)
            for i, j in ((1, 1), (2, 3), (2, 4)):
                trained, start = [], []
                for a, b in s["runs"]:
                    for name in layers:
                        matrix: Any = self.A if of == "A" else self.update
                        trained.append(
                            phi(matrix(sweep.states[a], name, 4.0), matrix(sweep.states[b], name, 2.0), i, j)
                        )
                        start.append(phi(self.A(sweep.starts[a], name), self.A(sweep.starts[b], name), i, j))
                assert s["phi"][i - 1][j - 1] == pytest.approx(np.mean(trained), rel=1e-4)
                if of == "A":
                    assert s["start"][i - 1][j - 1] == pytest.approx(np.mean(start), rel=1e-4)
            if of == "dW":
                assert s["start"] is None
            assert all(x["random"] == 4 / 32 for x in s["layers"].values())
            everywhere = np.mean([x["all"] for x in s["layers"].values()])
            assert everywhere == pytest.approx(s["phi"][-1][-1], rel=1e-4)

    @staticmethod
    def A(state: dict[str, Tensor], name: str, scaling: float = 1.0) -> np.ndarray:
        return state[f"{name}.lora_A"].numpy().astype(np.float64)

    @staticmethod
    def update(state: dict[str, Tensor], name: str, scaling: float) -> np.ndarray:
        a, b = (state[f"{name}.{part}"].numpy().astype(np.float64) for part in ("lora_A", "lora_B"))
        return scaling * b @ a

    def test_one_seed_compares_nothing_across_ranks(self, tmp_path: Path, bases: Callable[[str], Path]) -> None:
        """From one seed the smaller A starts inside the larger: phi would be 1 before anything was learned."""
        made = Made(tmp_path / "sweep", bases("bert"), make_data(tmp_path / "data.csv"))
        for cell in ("r2", "r4"):
            made.add(cell, 0, CELLS[cell])
        a, b = (made.starts[made.ids[cell, 0]][f"{QUERY}.lora_A"] for cell in ("r2", "r4"))
        V, other = (np.linalg.svd(x.double().numpy(), full_matrices=False)[2] for x in (a, b))
        assert np.linalg.norm(V @ other.T) ** 2 / 2 == pytest.approx(1)
        doc = measurement.measure_weights(made.root, WeightsRequest())
        assert doc["similarity"] == [] and doc["notes"] == [measurement.ONE_SEED_NOTE]


class TestResume:
    def test_what_is_known_is_not_measured_again(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = counted(monkeypatch)
        ticks: list[tuple[int, int]] = []
        measurement.measure_weights(sweep.root, WeightsRequest(), lambda *tick: ticks.append(tick))
        assert len(seen) == 8 and ticks == [(k, 32) for k in range(1, 33)]
        first = sweep.file.read_bytes()

        def no_base(self: SavedRun, **kwargs: Any) -> None:
            raise AssertionError("the base was loaded for nothing")

        monkeypatch.setattr(SavedRun, "base", no_base)
        measurement.measure_weights(sweep.root, WeightsRequest())
        measurement.measure_weights(
            sweep.root, WeightsRequest(intruders=False)
        )  # what is there holds more than is asked for
        assert len(seen) == 8
        assert sweep.file.read_bytes() == first
        assert sorted(p.name for p in sweep.file.parent.iterdir()) == ["weights.json"]

    def test_equal_weights_give_equal_files(self, sweep: Made) -> None:
        measurement.measure_weights(sweep.root, WeightsRequest())
        first = sweep.file.read_bytes()
        sweep.file.unlink()
        measurement.measure_weights(sweep.root, WeightsRequest())
        assert sweep.file.read_bytes() == first

    def test_weights_that_changed(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        before = measurement.measure_weights(sweep.root, WeightsRequest())
        changed = sweep.ids["r4", 1]
        sweep.train(changed, noise=1)
        seen = counted(monkeypatch)
        after = measurement.measure_weights(sweep.root, WeightsRequest())
        assert seen == [changed]
        for a, b in zip(before["similarity"], after["similarity"], strict=True):
            assert a["runs"] == b["runs"]
            assert (a["phi"] == b["phi"]) == all(changed not in pair for pair in a["runs"])

    def test_other_layers_or_intruders(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = counted(monkeypatch)
        measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",), layers=("value",), intruders=False))
        doc = measurement.measure_weights(
            sweep.root, WeightsRequest(cells=("r2",), layers=("0.*.query",), intruders=False)
        )
        assert all(list(run["layers"]) == [QUERY] for run in doc["runs"].values())
        assert all(list(s["layers"]) == [QUERY] for s in doc["similarity"])
        measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",), layers=("0.*.query",)))
        assert len(seen) == 9

    def test_a_killed_analysis_goes_on(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        real, seen = deltas.measure_run, list[str]()

        def killed(opened: Any, *args: Any, **kwargs: Any) -> Any:
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(opened.run_id)
            return real(opened, *args, **kwargs)

        monkeypatch.setattr(deltas, "measure_run", killed)
        with pytest.raises(KeyboardInterrupt):
            measurement.measure_weights(sweep.root, WeightsRequest())
        assert set(json.loads(sweep.file.read_text())["runs"]) == set(seen)
        monkeypatch.setattr(deltas, "measure_run", real)
        again = counted(monkeypatch)
        doc = measurement.measure_weights(sweep.root, WeightsRequest())
        assert len(again) == 6 and not set(again) & set(seen) and len(doc["runs"]) == 8

    def test_other_cells_stay(self, sweep: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = measurement.measure_weights(sweep.root, WeightsRequest())
        seen = counted(monkeypatch)
        sweep.train(sweep.ids["r2", 0], noise=2)
        part = measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",)))
        assert seen == [sweep.ids["r2", 0]]
        assert {i for i in whole["runs"] if part["runs"].get(i) != whole["runs"][i]} == {sweep.ids["r2", 0]}
        assert set(part["cells"]) == {"r2", "r4", "full", "head"}

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0, "runs": {}}'])
    def test_a_torn_or_older_file_is_made_again(self, sweep: Made, text: str) -> None:
        sweep.file.parent.mkdir()
        sweep.file.write_text(text)
        assert len(measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",)))["runs"]) == 3

    def test_the_sweep_directory_stays_a_sweeps(self, sweep: Made) -> None:
        measurement.measure_weights(sweep.root, WeightsRequest(cells=("r2",), intruders=False))
        sweep.store.check_foreign()


class TestCommandLine:
    def test_table_and_what_was_left_out(self, sweep: Made, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        shutil.rmtree(sweep.store.run_dir(sweep.ids["full", 0]) / "adapter")
        assert face.main([str(sweep.root)]) == 0
        said = capsys.readouterr()
        out = " ".join(said.out.split())
        assert "LoRA r = 2" in out and "full fine-tuning" in out and "amplification" in out and "intruders < 0.5" in out
        assert "full fine-tuning: 1 of 2 runs not analysed" in out and "trainer.save_weights was false" in out
        assert "head only: 1 of 1 run not analysed" in out or "head: 1 of 1 run not analysed" in out
        assert f"analysis: {sweep.file}" in said.out
        assert all(line.startswith("measuring the weights") for line in said.err.splitlines())  # where it takes long

    def test_bad_input(self, sweep: Made, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "empty").mkdir()
        refused(face, [str(tmp_path / "nowhere")], "an existing directory", capsys)
        refused(face, [str(tmp_path / "empty")], "neither sweep.json nor runs", capsys)
        refused(face, [str(sweep.root), "--cells", "r2", "r3"], "--cells=r3: cells of this sweep: r2, r4", capsys)
        refused(face, [str(sweep.root), "--layers", "dense"], "--layers=dense: layers that were trained", capsys)
        refused(face, [str(sweep.root), "--cells", "head"], "trains matrices of its base; head has none", capsys)
        assert not sweep.file.parent.exists()

    def test_no_finished_run(self, sweep: Made, capsys: Any) -> None:
        for record in sweep.store.records():
            record.status, record.error = "failed", "out of memory"
            sweep.store.write(record)
        refused(face, [str(sweep.root)], "a sweep with finished runs", capsys)

    def test_nothing_was_saved(self, sweep: Made, capsys: Any) -> None:
        for run in sweep.runs:
            shutil.rmtree(sweep.store.run_dir(run) / "adapter")
        refused(face, [str(sweep.root)], "trainer.save_weights was false, or they were deleted", capsys)
        assert not sweep.file.parent.exists()

    def test_torn_weights_are_left_out(self, sweep: Made, capsys: Any) -> None:
        path = sweep.store.run_dir(sweep.ids["r2", 1]) / "adapter" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        assert face.main([str(sweep.root), "--cells", "r2", "--no-intruders"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "1 of 3 runs not analysed" in out and "a whole safetensors file" in out

    def test_a_base_that_changed(self, sweep: Made, capsys: Any) -> None:
        for record in sweep.store.records():
            record.provenance["model_fingerprint"] = "0" * 64
            sweep.store.write(record)
        refused(face, [str(sweep.root)], "these differ", capsys)
        assert not sweep.file.parent.exists()

    def test_help_imports_nothing_heavy(self) -> None:
        code = "import sys, lorabench.analyze.__main__ as face\ntry: face.main(['--help'])\nexcept SystemExit: pass\n"
        code += (
            "print('heavy' if {'torch', 'transformers', 'omegaconf', 'rich', 'scipy'} & set(sys.modules) else 'light')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.endswith("light\n") and "usage: python -m lorabench.analyze" in done.stdout
