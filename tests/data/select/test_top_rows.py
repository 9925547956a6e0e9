import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.select import top_rows
from megatron_vlm.data.select.top_rows import TopRows


def test_memory_does_not_grow_with_the_number_of_rows():
    def peak(num_batches: int) -> int:
        generator, best = np.random.default_rng(0), TopRows(20_000)
        tracemalloc.start()
        for number in range(num_batches):
            # rising scores are the worst case: every row is better than all before it
            best.add(generator.random(10_000) + number, np.arange(number * 10_000, (number + 1) * 10_000))
        best.result()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(200) < 1.05 * peak(20)


@pytest.mark.parametrize("k", [1, 5, 999, 1000, 1001])
def test_top_rows_in_any_pieces_are_the_first_of_the_highest(monkeypatch, k):
    monkeypatch.setattr(top_rows, "_MIN_SPARE_ROWS", 3)
    scores = np.random.default_rng(k).integers(0, 40, 1000) / 8
    best, start = TopRows(k), 0
    for size in (1, 0, 500, 7, 492):
        best.add(scores[start : start + size], np.arange(start, start + size))
        start += size
    found_scores, rows = best.result()
    assert rows.tolist() == sorted(np.argsort(-scores, kind="stable")[:k].tolist())
    assert found_scores.tolist() == scores[rows].tolist()


@given(values=st.lists(st.integers(0, 30), max_size=60), k=st.integers(1, 20), step=st.integers(1, 7))
def test_complements_of_hashes_give_the_smallest_hashes(values, k, step):
    best = TopRows(k, np.uint64)
    hashes, rows = np.array(values, dtype=np.uint64), np.arange(len(values))
    for start in range(0, len(values), step):
        best.add(~hashes[start : start + step], rows[start : start + step])
    found, places = best.result()
    assert places.tolist() == sorted(np.argsort(hashes, kind="stable")[:k].tolist())
    assert (~found).tolist() == hashes[places].tolist()
