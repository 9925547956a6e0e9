"""No row exceeds its tokens or its images, and every sample stands in one row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import DataError
from megatron_vlm.data.plan.compute import plan_rows
from megatron_vlm.data.plan.packing import ImageBudget, pack_samples
from megatron_vlm.data.plan.two_budgets import find_kind_patterns
from tests.support.lengths import Lengths, make_dataset, make_settings

ROW, MOST = 64, 4
kinds = st.lists(st.tuples(st.integers(1, ROW), st.integers(0, MOST)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(samples=kinds, seed=st.integers(0, 99))
def test_rows_hold_both_budgets_and_every_sample_once(samples, seed):
    lengths, images = np.array(samples).T
    packed = pack_samples(lengths, ROW, np.random.default_rng(seed), ImageBudget(images, MOST))
    assert sorted(packed.order.tolist()) == list(range(len(samples)))
    assert (np.diff(packed.borders) > 0).all()
    for values, most in ((lengths, ROW), (images, MOST)):
        assert np.add.reduceat(values[packed.order], packed.borders[:-1]).max() <= most


@settings(max_examples=30, deadline=None)
@given(
    overflow=st.sampled_from(["truncate", "split", "drop"]),
    most=st.integers(1, 4),
    packing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_plan_holds_both_budgets(overflow, most, packing, seed):
    plan = make_settings(overflow=overflow, max_images_per_row=most, packing=packing, seq_length=80)
    rows = plan_rows(plan, [make_dataset(40, seed), make_dataset(20, seed + 1)])
    ids, borders, pool = rows.sample_ids, rows.row_borders[:-1], rows.pool
    assert sorted(ids.tolist()) == sorted(np.concatenate(pool.usable).tolist())
    assert np.add.reduceat(pool.num_images[ids], borders).max() <= most
    assert np.add.reduceat(pool.lengths[ids], borders).max() <= 80


def test_a_budget_that_no_row_exceeds_changes_nothing():
    datasets = [make_dataset(200), make_dataset(90, seed=1)]
    free, held = (plan_rows(make_settings(max_images_per_row=most), datasets) for most in (None, 8))
    assert np.array_equal(free.sample_ids, held.sample_ids)
    assert np.array_equal(free.row_borders, held.row_borders)


def test_a_sample_with_too_many_images_is_refused_by_name():
    datasets = [Lengths([1, 3], [4, 4]), Lengths([0], [4])]
    with pytest.raises(
        DataError, match=r"1 samples have more images than data.max_images_per_row=2; .* \(a sample 1\)"
    ):
        plan_rows(make_settings(max_images_per_row=2), datasets)
    with pytest.raises(ValueError, match="a sample has 3 images, a row has at most 2"):
        pack_samples(np.array([4]), ROW, np.random.default_rng(0), ImageBudget(np.array([3]), 2))


def test_samples_of_many_images_meet_samples_of_much_text():
    # Only three short samples of one image and one of much text fill both budgets.
    found = find_kind_patterns(np.array([[8, 1], [40, 1]]), np.array([30, 10]), (ROW, MOST))
    assert found.num_rows == 10


def test_a_budget_near_the_mean_costs_few_rows_though_many_rows_exceed_it():
    # By length alone, documents of much text fill rows with few images, and pairs are left for rows with many.
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.integers(1, 7, 1000), np.ones(4000, dtype=np.int64)])
    text = np.where(np.arange(5000) < 1000, images * rng.integers(20, 41, 5000), rng.integers(2, 13, 5000))
    lengths, row, most = images * 36 + text, 1024, 19
    free = pack_samples(lengths, row, np.random.default_rng(0))
    per_row = np.add.reduceat(images[free.order], free.borders[:-1])
    assert most - 1 < per_row.mean() < most
    assert (per_row > most).mean() > 0.4
    held = pack_samples(lengths, row, np.random.default_rng(0), ImageBudget(images, most))
    assert len(held.borders) <= 1.002 * len(free.borders)
