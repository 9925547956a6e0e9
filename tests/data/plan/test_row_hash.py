"""Every way in which a global batch can differ from the planned one changes its hash."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.row_hash import HASH_BITS, hash_rows

PLANNED = [[5, 9], [7], [], [1, 2, 3]]


def hash_of(rows, indices=None) -> int:
    ids = np.array([sample for row in rows for sample in row], dtype=np.int64)
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return hash_rows(ids, sizes, range(len(rows)) if indices is None else indices)


@pytest.mark.parametrize(
    "consumed",
    [
        pytest.param([[5, 8], [7], [], [1, 2, 3]], id="a wrong sample"),
        pytest.param([[9, 5], [7], [], [1, 2, 3]], id="samples in another order"),
        pytest.param([[7], [5, 9], [], [1, 2, 3]], id="exchanged rows"),
        pytest.param([[5, 9], [7], [7], [1, 2, 3]], id="a doubled row"),
        pytest.param([[5, 9], [], [], [1, 2, 3]], id="a missing row"),
        pytest.param([[5], [9, 7], [], [1, 2, 3]], id="a sample in the next row"),
        pytest.param([[5, 9], [7], [], [1, 2]], id="a missing sample"),
        pytest.param([[5, 9], [], [7], [1, 2, 3]], id="a row in the place of an empty one"),
    ],
)
def test_what_differs_from_the_plan_has_another_hash(consumed):
    assert hash_of(consumed) != hash_of(PLANNED)


@given(
    rows=st.lists(st.lists(st.integers(0, 2**40), max_size=4), min_size=1, max_size=12),
    size=st.integers(1, 4),
    micro_batch_size=st.integers(1, 3),
)
def test_parts_of_any_cut_sum_to_the_whole(rows, size, micro_batch_size):
    parts = [
        list(range(len(rows)))[rank::size][first : first + micro_batch_size]
        for rank in range(size)
        for first in range(0, len(rows), micro_batch_size)
    ]
    total = sum(hash_of([rows[index] for index in part], part) for part in parts)
    assert total % (1 << HASH_BITS) == hash_of(rows)


def test_rows_without_samples_add_nothing():
    assert hash_of([[], []]) == 0


def test_hash_is_the_same_on_every_machine():
    assert hash_of(PLANNED) == 0xD3886CE4CB48043B
