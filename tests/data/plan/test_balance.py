"""Every batch, and every rank's part of it, has about the same images and attention work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan import balance
from megatron_vlm.data.plan.balance import balance_ranks, deal_rows


def make_rows(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    images = rng.integers(0, 8, number)
    return images, rng.gamma(3.0, 1e6, number) + images * 1e5


def imbalance(values: np.ndarray, groups: np.ndarray) -> float:
    """Largest group over the mean of all groups."""
    sums = np.bincount(groups, weights=values)
    return float(sums.max() / sums.mean())


@given(batches=st.integers(0, 5), size=st.integers(1, 48), seed=st.integers(0, 99))
def test_rows_stay_in_their_batch(batches, size, seed):
    images, work = make_rows(batches * size, np.random.default_rng(seed))
    order = balance_ranks(images, work, size)
    assert (np.sort(order.reshape(batches, size), axis=1) == np.arange(batches * size).reshape(batches, size)).all()


@given(rows=st.integers(0, 100), first_slot=st.integers(0, 50), size=st.integers(1, 16), seed=st.integers(0, 99))
def test_every_row_gets_one_slot(rows, first_slot, size, seed):
    rng = np.random.default_rng(seed)
    images, work = make_rows(rows, rng)
    order = deal_rows(images, work, first_slot=first_slot, global_batch_size=size, rng=rng)
    assert sorted(order.tolist()) == list(range(rows))


def test_batches_are_even():
    rng = np.random.default_rng(0)
    images, work = make_rows(128 * 100, rng)
    order = deal_rows(images, work, first_slot=0, global_batch_size=128, rng=rng)
    batches, shuffled = np.arange(len(order)) // 128, rng.permutation(len(order))
    assert imbalance(work[order], batches) - 1 < 0.6 * (imbalance(work[shuffled], batches) - 1)
    assert imbalance(images[order], batches) < 1.01


@pytest.mark.parametrize(("data_parallel_size", "bound"), [(2, 1.01), (8, 1.02), (16, 1.08)])
def test_parts_of_ranks_are_even(data_parallel_size, bound):
    rng = np.random.default_rng(0)
    images, work = make_rows(128 * 100, rng)
    order = balance_ranks(images, work, 128)
    ranks = np.arange(128) % data_parallel_size
    for values in (images[order], work[order]):
        parts = np.stack([values.reshape(-1, 128)[:, ranks == rank].sum(axis=1) for rank in range(data_parallel_size)])
        assert (parts.max(axis=0) / parts.mean(axis=0)).mean() < bound


def test_pairs_hold_no_more_images_than_an_even_share():
    # Rows of 7, 6 and 5 images as packing makes them, those of 5 with most work: 12 images are an even share.
    rng = np.random.default_rng(0)
    images = rng.choice([5, 6, 7], (20, 64), p=[0.25, 0.7, 0.05])
    work = np.where(images == 5, 8.0, 2.0) * rng.gamma(20.0, 0.05, images.shape)
    load = np.stack([images / images.mean(axis=1, keepdims=True), work / work.mean(axis=1, keepdims=True)], axis=-1)
    pairs = balance._pair_rows(images, load)
    assert sorted(pairs.reshape(-1).tolist()) == list(range(images.size))
    assert images.reshape(-1)[pairs].sum(axis=2).max() == 12
    largest_first = -np.sort(-work, axis=1)
    no_lower = (largest_first + largest_first[:, ::-1]).max(axis=1)
    assert (work.reshape(-1)[pairs].sum(axis=2).max(axis=1) < 1.1 * no_lower).all()


@pytest.mark.parametrize("size", [4, 32, 128])
def test_pairs_are_taken_where_they_are_more_even(size):
    images, work = make_rows(size * 50, np.random.default_rng(0))
    load = np.stack([images, work], axis=-1).astype(float).reshape(-1, size, 2)
    load /= load.mean(axis=1, keepdims=True)
    chosen = balance._waiting(load, balance_ranks(images, work, size).reshape(-1, size))
    assert (chosen <= balance._waiting(load, balance._place_evenly(load))).all()


def test_batches_that_begin_in_the_middle_are_even():
    rng = np.random.default_rng(0)
    images, work = make_rows(32 * 40, rng)
    order = deal_rows(images, work, first_slot=13, global_batch_size=32, rng=rng)
    whole = order[32 - 13 :][: 32 * 38]
    assert imbalance(images[whole], np.arange(len(whole)) // 32) < 1.06


def test_order_within_a_stratum_is_random():
    rng = np.random.default_rng(0)
    order = deal_rows(np.zeros(1000), np.zeros(1000), first_slot=0, global_batch_size=8, rng=rng)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
