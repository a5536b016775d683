"""Which examples a step holds, and in which order."""

import numpy as np
import pytest

from lorabench.batches import EvalStream, PackStream, epoch_order, steps_per_epoch

LENGTHS = np.random.default_rng(0).integers(3, 60, size=997).tolist()


def _collate(examples):
    return {"example": np.array([e["id"] for e in examples])}


def _stream(seeds, accumulate=1, total=70, n=997):
    examples = [{"id": i} for i in range(n)]
    return PackStream(
        examples, LENGTHS[:n], seeds, batch_size=32, accumulate=accumulate, total_steps=total, collate=_collate
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


def test_a_slice_meets_the_same_examples_whoever_else_is_in_the_pack():
    alone, packed = _stream([7]), _stream([3, 7, 3])
    for step in (0, 5, 31, 32, 69):
        for a, p in zip(alone[step], packed[step], strict=True):
            rows = p["example"].reshape(3, -1)
            assert np.array_equal(a["example"], rows[1])
            assert np.array_equal(rows[0], rows[2])


def test_accumulation_cuts_the_same_examples_into_micro_batches():
    one, four = _stream([0], total=8), _stream([0], accumulate=4, total=8)
    assert [len(x) for x in four][:7] == [4] * 7
    first = np.concatenate([m["example"] for m in four[0]])
    assert np.array_equal(first, np.concatenate([one[i][0]["example"] for i in range(4)]))


@pytest.mark.parametrize(
    ("n", "batch", "acc", "want"), [(997, 32, 1, 32), (997, 32, 4, 8), (31, 32, 1, 1), (64, 32, 1, 2)]
)
def test_steps_per_epoch(n, batch, acc, want):
    assert steps_per_epoch(n, batch, acc) == want


def test_evaluation_sees_every_example_once_a_slice():
    examples = [{"id": i} for i in range(50)]
    stream = EvalStream(examples, LENGTHS[:50], 3, rows=32, collate=_collate)
    rows = [b["example"].reshape(3, -1) for b in stream]
    assert len(rows) == len(stream)
    for k in range(3):
        assert sorted(np.concatenate([r[k] for r in rows]).tolist()) == list(range(50))
