"""Two sweeps side by side: what is matched, what a difference is over, and what may not be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.sweeps import RANK_SWEEP, Planted, build
from lorabench.compare import __main__ as command
from lorabench.compare import comparison
from lorabench.compare.comparison import SweepComparison, compare, difference, independent
from lorabench.results.scores import Sample
from lorabench.results.sweep import load
from lorabench.stats import estimates
from lorabench.store.records import Record, Store

SMALL = (RANK_SWEEP[1], RANK_SWEEP[3], RANK_SWEEP[4])  # r = 4, r = 64, head only
WORSE = tuple(dataclasses.replace(c, quality=c.quality - 0.05) for c in SMALL)


def make(root: Path, cells: Sequence[Planted] = SMALL, **settings: Any) -> Path:
    return build(root, cells, examples=400, **settings).root


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("a") / "first")


def rewrite(root: Path, change: Callable[[Record], Record]) -> Path:
    store = Store(root)
    for record in store.records():
        store.write(change(record))
    return root


def provenance(**changes: Any) -> Callable[[Record], Record]:
    return lambda r: dataclasses.replace(r, provenance={**r.provenance, **changes})


def both(a: Path, b: Path) -> SweepComparison:
    return compare(load(a), load(b))


def sampled(table: np.ndarray) -> Sample:
    S, N = table.shape
    return Sample(tuple(range(S)), table.mean(1), table, examples=np.arange(N))


def test_a_sweep_and_itself(a: Path) -> None:
    made = both(a, a)
    assert made.obstacles == ()
    assert made.differing == ()
    assert [p.difference.mean for p in made.pairs if p.difference] == [0, 0, 0]
    assert {p.how for p in made.pairs} == {"same seeds and examples, paired"}


def test_the_same_seeds_are_paired(a: Path, tmp_path: Path) -> None:
    made = both(a, make(tmp_path / "b", WORSE))
    pair = made.pairs[0]
    assert pair.a and pair.b and pair.difference
    left, right = pair.a.sample, pair.b.sample
    assert left and right and left.table is not None and right.table is not None
    assert pair.difference == estimates.crossed_mean(right.table - left.table)
    assert pair.difference.interval()[1] < 0  # B was made worse by 5 points


def test_other_seeds_are_independent(a: Path, tmp_path: Path) -> None:
    made = both(a, make(tmp_path / "b", WORSE, confirm=(200, 201, 202, 203)))
    assert {p.how for p in made.pairs} == {"independent seeds, same examples"}
    pair = made.pairs[1]
    assert pair.a and pair.b and pair.difference
    assert pair.a.test and pair.b.test
    assert pair.difference.mean == pytest.approx(pair.b.test.mean - pair.a.test.mean)
    assert pair.difference.seeds == 3
    # The examples are shared, so the difference is surer than that of two sweeps that share nothing.
    assert pair.difference.variance < pair.a.sample.estimate().variance + pair.b.sample.estimate().variance  # type: ignore[union-attr]


def test_without_examples_only_seeds_are_known(a: Path, tmp_path: Path) -> None:
    made = both(a, make(tmp_path / "b", arrays=False, confirm=(200, 201, 202)))
    assert {p.how for p in made.pairs} == {"independent seeds"}
    pair = made.pairs[0]
    assert pair.a and pair.b and pair.difference and pair.a.sample and pair.b.sample
    parts = [s.estimate() for s in (pair.a.sample, pair.b.sample)]
    assert pair.difference.seed == pytest.approx(sum(p.seed for p in parts))
    assert pair.difference.example == parts[0].example
    again = both(a, make(tmp_path / "c", WORSE, arrays=False))
    assert {p.how for p in again.pairs} == {"same seeds, paired"}
    assert again.pairs[0].difference and again.pairs[0].difference.examples is None


def test_other_examples_give_no_difference() -> None:
    tables = [np.eye(3), np.eye(3)]
    one, two = (Sample((1, 2, 3), t.mean(1), t, examples=np.arange(3) + k) for k, t in enumerate(tables))
    assert difference(one, two) == (None, "other test examples")


def test_groups_that_one_of_two_sweeps_knows_hold_for_both() -> None:
    rng, groups = np.random.default_rng(3), np.repeat(np.arange(20), 3)
    tables = [rng.normal(size=(4, 60)) + rng.normal(size=20)[groups] for _ in range(2)]
    seeds, ids = (0, 1, 2, 3), np.arange(60)
    knows = Sample(seeds, tables[0].mean(1), tables[0], examples=ids, groups=groups)
    older = Sample(seeds, tables[1].mean(1), tables[1], examples=ids)
    paired, how = difference(knows, older)
    assert paired and how == "same seeds and examples, paired" and paired.examples == 60
    assert paired.example_df == pytest.approx(19)
    apart = independent(knows, dataclasses.replace(older, seeds=(5, 6, 7, 8)))
    assert apart.example == pytest.approx(paired.example) and apart.example_df == pytest.approx(19)


def test_independent_seeds_have_their_coverage() -> None:
    """Two sets of seeds that met the same examples, drawn from a model with all three sources of variance."""
    rng = np.random.default_rng(8)
    hits, draws, truth = 0, 500, 0.3
    for _ in range(draws):
        shared = rng.normal(0, 2.0, 40)

        def table(seeds: int, mean: float, shared: np.ndarray = shared) -> np.ndarray:
            own = rng.normal(0, 0.5, 40)  # this sweep's own effect on each example
            return mean + shared + own + rng.normal(0, 0.4, (seeds, 1)) + rng.normal(0, 1.0, (seeds, 40))

        low, high = independent(sampled(table(4, 0.0)), sampled(table(6, truth))).interval()
        hits += low < truth < high
    assert 0.92 < hits / draws < 0.99  # each part has its own quantile: on the safe side


def test_resamples_of_shared_examples_are_paired() -> None:
    """A bootstrap of the mean finds what the table of the same seeds and examples gives."""
    rng = np.random.default_rng(6)
    shared = rng.normal(0, 2.0, 60)
    tables = [shared + rng.normal(0, 0.3, (n, 1)) + rng.normal(0, 1.0, (n, 60)) for n in (4, 5)]
    counts = rng.multinomial(60, np.full(60, 1 / 60), size=20_000)
    drawn = [Sample(tuple(range(len(t))), t.mean(1), draws=counts @ t.T / 60, examples=np.arange(60)) for t in tables]
    exact, found = independent(*map(sampled, tables)), independent(*drawn)
    assert found.mean == pytest.approx(exact.mean)
    assert found.variance == pytest.approx(exact.variance, rel=0.03)
    assert found.variance < 0.5 * (drawn[0].estimate().variance + drawn[1].estimate().variance)


def test_independent_seeds_of_one_example_set_are_two_samples() -> None:
    """Where examples do not vary, the scatter of both sets of seeds is all there is, each with its own quantile."""
    from scipy import stats

    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 1, 4), rng.normal(1, 2, 6)
    made = independent(sampled(np.repeat(x[:, None], 30, 1)), sampled(np.repeat(y[:, None], 30, 1)))
    assert made.half_width() == pytest.approx(
        np.sqrt(sum(stats.t.ppf(0.975, len(v) - 1) ** 2 * v.var(ddof=1) / len(v) for v in (x, y)))
    )


def test_cells_of_one_sweep_alone_are_listed(a: Path, tmp_path: Path) -> None:
    made = both(a, make(tmp_path / "b", (SMALL[0], RANK_SWEEP[2])))
    found = {p.name: p.how for p in made.pairs}
    assert found["LoRA r = 64"] == found["head only"] == "only in A"
    assert found["LoRA r = 16"] == "only in B"
    assert found["LoRA r = 4"] == "same seeds and examples, paired"


def test_alpha_tells_cells_apart(a: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(SMALL[0], alpha=32.0)
    made = both(a, make(tmp_path / "b", (other, SMALL[1])))
    assert [p.how for p in made.pairs].count("only in A") == 2
    assert [p.how for p in made.pairs].count("only in B") == 1


def test_cells_over_several_data_sets_are_compared_each_with_its_own(a: Path, tmp_path: Path) -> None:
    """A sweep over sizes of the data has a fingerprint a size."""

    def by_rank(changed: str = "") -> Callable[[Record], Record]:
        def change(r: Record) -> Record:
            rank = str(r.config["method"].get("r"))
            return provenance(data_fingerprint=f"da7a{rank}{'new' if rank == changed else ''}")(r)

        return change

    one, two = rewrite(make(tmp_path / "one"), by_rank()), rewrite(make(tmp_path / "two", WORSE), by_rank("4"))
    made = both(one, two)
    assert made.obstacles == ()
    assert {p.name: p.how for p in made.pairs} == {
        "LoRA r = 4": "other data",
        "LoRA r = 64": "same seeds and examples, paired",
        "head only": "same seeds and examples, paired",
    }
    assert (
        comparison.headline(made)
        == "3 cells in both sweeps, 2 with a difference on test: of one metric, on the same data."
    )


def test_examples_of_one_group_give_no_variance() -> None:
    table, seeds = np.random.default_rng(2).normal(size=(3, 5)), (0, 1, 2)
    one = Sample(seeds, table.mean(1), table, examples=np.arange(5), groups=np.zeros(5, int))
    other = dataclasses.replace(one, seeds=(3, 4, 5), scores=table.mean(1) + 1)
    made = independent(one, other)
    assert (made.example, made.examples) == (0, None)
    assert made.variance == pytest.approx(2 * table.mean(1).var(ddof=1) / 3)


def test_lost_runs_give_no_difference(a: Path, tmp_path: Path) -> None:
    b = make(tmp_path / "b")
    run_id = Store(b).manifest()["cells"][0]["runs"]["confirm"][0]
    rewrite(b, lambda r: dataclasses.replace(r, status="diverged") if r.run_id == run_id else r)
    pair = both(a, b).pairs[0]
    assert pair.difference is None
    assert pair.how == "confirmation runs in B did not survive"


@pytest.mark.parametrize("case", ["data", "unknown data", "mixed data", "metric"])
def test_what_may_not_be_compared_says_so_on_top(
    case: str, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = make(tmp_path / "b", metric="macro_f1" if case == "metric" else "accuracy")
    if case == "data":
        rewrite(b, provenance(data_fingerprint="beef" * 4))
    elif case == "unknown data":
        rewrite(b, provenance(data_fingerprint=None))
    elif case == "mixed data":
        rewrite(b, lambda r: provenance(data_fingerprint="beef" * 4)(r) if r.config["seed"] == 101 else r)
    made = both(a, b)
    assert made.obstacles
    assert all(p.difference is None for p in made.pairs)
    out = tmp_path / "out.md"
    assert command.main([str(a), str(b), "--out", str(out)]) == 1
    assert capsys.readouterr().out.startswith("Not comparable: ")
    lines = [x for x in out.read_text().splitlines() if x]
    assert lines[1].startswith("**Not comparable: ")
    assert ("metric" if case == "metric" else "data") in lines[1]
    assert "paired" not in out.read_text()


def test_what_differs_is_listed(a: Path, tmp_path: Path) -> None:
    b = make(tmp_path / "b", study={"margin": 0.01}, confirm=(100, 101, 103))

    def change(r: Record) -> Record:
        packages = {**r.provenance["packages"], "torch": "2.14.0"}
        config = {**r.config, "trainer": {**r.config["trainer"], "batch_size": 16}}
        machine = {**r.provenance["machine"], "host": "elsewhere"}
        return dataclasses.replace(
            r, config=config, provenance={**r.provenance, "packages": packages, "code": "fee1" * 4, "machine": machine}
        )

    found = {key: (one, two) for key, one, two in both(a, rewrite(b, change)).differing}
    assert found["packages.torch"] == ("2.13.0+cpu", "2.14.0")
    assert found["source hash"] == ("c0de" * 4, "fee1" * 4)
    assert found["trainer.batch_size"] == ("32", "16")
    assert found["study.margin"] == ("0.02", "0.01")
    assert found["seed (confirm)"] == ("100, 101, 102", "100, 101, 103")
    assert set(found) == {"packages.torch", "source hash", "trainer.batch_size", "study.margin", "seed (confirm)"}


def test_markdown_holds_the_numbers(a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b, out = make(tmp_path / "b", WORSE, name="second *sweep*"), tmp_path / "new" / "out.md"
    assert command.main([str(a), str(b), "--out", str(out)]) == 0
    text = out.read_text()
    assert text.startswith("# synthetic \\(first\\) and " if "\\(" in text else "# synthetic (first) and ")
    assert "second \\*sweep\\* (b)" in text
    made = both(a, b)
    pair = made.pairs[0]
    assert pair.difference and pair.b and pair.b.test
    assert made.a.metric.bounds(*pair.difference.interval()) in text
    assert made.b.metric.value(pair.b.test.mean) in text
    said = capsys.readouterr().out
    assert "3 cells in both sweeps, 3 with a difference on test" in said


def test_sweeps_that_only_tuned_show_validation(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", confirm=()), make(tmp_path / "b", WORSE, confirm=())
    made = both(one, two)
    assert {p.how for p in made.pairs} == {"no test result in A"}
    text = comparison.markdown(made)
    assert "A: validation accuracy" in text
    assert made.pairs[0].a is not None
    assert made.a.metric.value(made.pairs[0].a.val) in text


def test_the_reference_sweep_compares_with_itself(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(repo / "sweeps/ref_rank_sweep")
    assert command.main([path, path]) == 0
    assert "6 cells in both sweeps, 6 with a difference on test" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["missing", "out is a folder"])
def test_bad_input_exits_2_and_writes_nothing(
    case: str, a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.md"
    if case == "out is a folder":
        out.mkdir()
    assert command.main([str(a), str(a if out.is_dir() else tmp_path / "nothing"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not out.is_file()
