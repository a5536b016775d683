"""Which examples a step holds, and in which order."""

import numpy as np
import pytest

from lorabench.training.batches import EvalStream, PackStream, epoch_order, steps_per_epoch

LENGTHS = np.random.default_rng(0).integers(3, 60, size=997).tolist()


def _collate(examples):
    return {"example": np.array([e["id"] for e in examples])}


def _stream(seeds, accumulate=1, total=70, n=997, **options):
    examples = [{"id": i} for i in range(n)]
    return PackStream(
        examples,
        LENGTHS[:n],
        seeds,
        batch_size=32,
        accumulate=accumulate,
        total_steps=total,
        collate=_collate,
        **options,
    )


def test_an_epoch_holds_every_example_once():
    for seed in (0, 1):
        seen = np.concatenate(epoch_order(LENGTHS, 32, seed, 0))
        assert sorted(seen.tolist()) == list(range(997))


def test_seeds_differ_in_examples_and_agree_in_sizes():
    a, b = epoch_order(LENGTHS, 32, 0, 0), epoch_order(LENGTHS, 32, 1, 0)
    assert [len(x) for x in a] == [len(x) for x in b]
    assert not all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_of_one_length_across_seeds():
    def padded(seeds):
        total = true = 0
        orders = [epoch_order(LENGTHS, 32, s, 0) for s in seeds]
        for batches in zip(*orders, strict=True):
            sizes = np.array(LENGTHS)[np.concatenate(batches)]
            total, true = total + sizes.max() * len(sizes), true + sizes.sum()
        return total / true

    assert padded([0]) < 1.15
    assert padded(range(6)) < padded([0]) * 1.12


def _examples(parts, slices):
    """Example ids of each slice in a step's parts, one micro-batch after the other."""
    found = {k: [] for k in range(slices)}
    for part in parts:
        for k, rows in zip(part.slices, part.batch["example"].reshape(len(part.slices), -1), strict=True):
            found[k].append(rows)
    return {k: np.concatenate(rows) for k, rows in found.items() if rows}


def test_a_slice_meets_the_same_examples_whoever_else_is_in_the_pack():
    alone, packed = _stream([7]), _stream([3, 7, 3])
    for step in (0, 5, 31, 32, 69):
        assert len(packed[step]) == 1
        rows = _examples(packed[step], 3)
        assert np.array_equal(_examples(alone[step], 1)[0], rows[1])
        assert np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_budget_parts_the_slices_and_changes_nobodys_examples(accumulate):
    seeds = [3, 7, 3, 1, 1]
    whole, parted = _stream(seeds, accumulate), _stream(seeds, accumulate, budget=2500)
    several = 0
    for step in (0, 5, 6, 7):
        want, got = _examples(whole[step], 5), _examples(parted[step], 5)
        for k in range(5):
            assert np.array_equal(want[k], got[k])
        for part in parted[step]:
            longest = max(LENGTHS[i] for i in part.batch["example"])
            assert len(part.slices) == 1 or len(part.batch["example"]) * longest <= 2 * 2500  # about one size
        for micro in {part.micro for part in parted[step]}:
            own = [part.slices for part in parted[step] if part.micro == micro]
            assert [k for slices in own for k in slices] == list(range(5))
            assert max(map(len, own)) - min(map(len, own)) <= 1
            several += len(own) > 1
    assert several


def test_slices_that_left_are_not_fed():
    live = [0, 1, 2]
    stream = _stream([3, 7, 3], live=lambda: live)
    assert [p.slices for p in stream[0]] == [(0, 1, 2)]
    live = [0, 2]
    assert [p.slices for p in stream[1]] == [(0, 2)]
    assert np.array_equal(_examples(stream[1], 3)[2], _examples(_stream([3])[1], 1)[0])
    live = []
    assert stream[2] == []


def test_accumulation_cuts_the_same_examples_into_micro_batches():
    one, four = _stream([0], total=8), _stream([0], accumulate=4, total=8)
    assert [len(x) for x in four][:7] == [4] * 7
    assert [part.micro for part in four[0]] == [0, 1, 2, 3]
    first = np.concatenate([m.batch["example"] for m in four[0]])
    assert np.array_equal(first, np.concatenate([one[i][0].batch["example"] for i in range(4)]))


@pytest.mark.parametrize(
    ("n", "batch", "acc", "want"), [(997, 32, 1, 32), (997, 32, 4, 8), (31, 32, 1, 1), (64, 32, 1, 2)]
)
def test_steps_per_epoch(n, batch, acc, want):
    assert steps_per_epoch(n, batch, acc) == want


@pytest.mark.parametrize("budget", [None, 300])
def test_evaluation_sees_every_example_once_a_slice(budget):
    examples = [{"id": i} for i in range(50)]
    stream = EvalStream(examples, LENGTHS[:50], lambda: [0, 2, 3], rows=32, collate=_collate, budget=budget)
    parts = list(stream)
    assert len(parts) == len(stream)
    assert {p.slices for p in parts} == {(0, 2, 3)}
    rows = [p.batch["example"].reshape(3, -1) for p in parts]
    for k in range(3):
        assert sorted(np.concatenate([r[k] for r in rows]).tolist()) == list(range(50))
    for r in rows:
        assert r.size <= 32
        assert budget is None or r.shape[1] == 1 or r.size * max(LENGTHS[i] for i in r[0]) <= budget


@pytest.mark.parametrize("n", [997, 994, 993])  # a last micro-batch of 5, 2 and 1 rows for three processes
def test_processes_that_share_a_pack_cut_it_alike(n):
    seeds = [3, 7, 3]
    steps = steps_per_epoch(n, 32, 2)
    whole = _stream(seeds, 2, n=n)
    shared = [_stream(seeds, 2, n=n, budget=600, shares=(rank, 3)) for rank in range(3)]
    for step in range(steps):
        parts = [stream[step] for stream in shared]
        assert len({tuple((p.micro, p.slices) for p in own) for own in parts}) == 1
        dealt = [_examples([p for p in own if p.counts], 3) for own in parts]
        assert all(p.counts for p in parts[0])
        for k, rows in _examples(whole[step], 3).items():
            assert sorted(np.concatenate([own[k] for own in dealt if own])) == sorted(rows)


@pytest.mark.parametrize("n", [50, 49, 2])
def test_processes_evaluate_in_as_many_parts(n):
    examples = [{"id": i} for i in range(n)]
    streams = [
        EvalStream(examples, LENGTHS[:n], lambda: [0, 2], rows=8, collate=_collate, budget=300, shares=(rank, 3))
        for rank in range(3)
    ]
    parts = [list(stream) for stream in streams]
    assert len({len(own) for own in parts} | {len(stream) for stream in streams}) == 1
    seen = [p.batch["example"].reshape(2, -1)[1] for own in parts for p in own if p.counts]
    assert sorted(np.concatenate(seen).tolist()) == list(range(n))
    assert all(len(p.batch["example"]) <= 8 for own in parts for p in own)
