"""Without packing, the rows of a global batch are about equally long, and the batches stay random."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.data.plan.clustering import cluster_by_length, clustered_row_lengths


@given(number=st.integers(0, 300), first_slot=st.integers(0, 50), batch=st.integers(1, 16), seed=st.integers(0, 9))
def test_every_sample_gets_one_row(number, first_slot, batch, seed):
    rng = np.random.default_rng(seed)
    order = cluster_by_length(rng.integers(1, 99, number), first_slot=first_slot, global_batch_size=batch, rng=rng)
    assert sorted(order.tolist()) == list(range(number))


def test_samples_of_a_batch_are_of_similar_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1001, 64 * 200)
    order = cluster_by_length(lengths, first_slot=0, global_batch_size=64, rng=rng)
    batches = lengths[order].reshape(-1, 64)
    assert np.median(batches.max(axis=1) - batches.min(axis=1)) < 1000 / 40


def test_batches_come_in_random_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1001, 64 * 200)
    order = cluster_by_length(lengths, first_slot=0, global_batch_size=64, rng=rng)
    means = lengths[order].reshape(-1, 64).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_batch_that_is_already_begun_is_completed_first():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1001, 64 * 20)
    order = cluster_by_length(lengths, first_slot=24, global_batch_size=64, rng=rng)
    spread = np.ptp(lengths[order][40 : 40 + 64 * 19].reshape(-1, 64), axis=1)
    assert np.median(spread) < 100


def test_rows_are_as_long_as_the_longest_of_their_batch():
    lengths = np.array([3, 64, 65, 100, 7])
    found = clustered_row_lengths(lengths, global_batch_size=2, multiple=64, seq_length=120)
    assert found.tolist() == [64, 120, 64]


def test_no_sample_no_batch():
    none = np.empty(0, dtype=np.int32)
    assert clustered_row_lengths(none, global_batch_size=2, multiple=64, seq_length=120).tolist() == []
