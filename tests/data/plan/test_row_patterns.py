"""Patterns use up the histogram, and the prices behind them bound the number of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.plan.row_patterns import best_values, find_patterns, staircase_prices


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seq_length=st.integers(1, 80))
def test_patterns_use_up_the_counts_exactly(data, seq_length):
    counts = np.array([0, *data.draw(st.lists(st.integers(0, 40), min_size=seq_length, max_size=seq_length))])
    patterns = find_patterns(counts, seq_length)
    per_length = np.repeat(patterns.uses, np.diff(patterns.borders))
    assert (np.bincount(patterns.lengths, weights=per_length, minlength=seq_length + 1) == counts).all()
    sums = [patterns.lengths[a:b].sum() for a, b in zip(patterns.borders[:-1], patterns.borders[1:], strict=True)]
    assert max(sums, default=0) <= seq_length


@pytest.mark.parametrize(("stairs", "slope"), [(1, 1.0), (6, 1000.0), (6, 55.0), (13, 10.0)])
def test_prices_rise_with_the_length_from_nothing_to_a_row(stairs, slope):
    prices = staircase_prices(4096, stairs, slope)
    assert prices[0] == 0
    assert prices[-1] == pytest.approx(1)
    assert (np.diff(prices) >= -1e-12).all()


def test_ramp_passes_through_the_equal_parts_of_a_row():
    prices = staircase_prices(700, 6, 10.0)
    assert prices[100::100] == pytest.approx(np.arange(1, 8) / 7)


def test_steep_staircase_counts_parts():
    prices = staircase_prices(700, 6, 1e6)
    assert prices[[99, 101, 199, 201, 301]] * 6 == pytest.approx([0, 1, 1, 2, 3])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_best_values_equal_the_plain_recurrence(data):
    seq_length = 40
    available = np.array(sorted(data.draw(st.sets(st.integers(1, seq_length), min_size=1))))
    prices = np.array(data.draw(st.lists(st.integers(0, 50), min_size=41, max_size=41)), dtype=float)
    expected = [0.0]
    for size in range(1, seq_length + 1):
        choices = [expected[size - length] + prices[length] for length in available if length <= size]
        expected.append(max([expected[-1], *choices]))
    assert best_values(prices, available)[::-1].tolist() == expected


def test_short_texts_go_where_they_let_one_more_image_in():
    # 8 x 8 and 6 x 10 fit in 64, so 100 rows of each; filling rows of tens with an eight would cost more rows.
    counts = np.zeros(65, dtype=int)
    counts[[8, 10]] = 800, 600
    assert find_patterns(counts, 64).num_rows <= 200


@pytest.mark.parametrize("kind", ["spread", "short"])
def test_rows_of_other_length_distributions_are_nearly_full(kind):
    rng = np.random.default_rng(0)
    lengths = {
        "spread": rng.integers(1, 1025, 100_000),
        "short": rng.integers(1, 100, 100_000),
    }[kind]
    counts = np.bincount(lengths, minlength=1025)
    assert lengths.sum() / (find_patterns(counts, 1024).num_rows * 1024) > 0.97
