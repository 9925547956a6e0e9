"""Proportions of a blend, and reading in whole epochs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import BlendEntry, ConfigError
from megatron_vlm.data.plan.blend import read_in_epochs, samples_per_pass


def make_blend(**shares) -> list[BlendEntry]:
    (name, values), *_ = shares.items()
    return [BlendEntry(path=f"d{index}", **{name: value}) for index, value in enumerate(values)]


def test_entries_without_a_proportion_are_read_once():
    assert samples_per_pass([BlendEntry(path="a"), BlendEntry(path="b")], [10, 30], [0, 0]).tolist() == [10, 30]


def test_epochs_multiply_the_dataset():
    assert samples_per_pass(make_blend(epochs=[0.5, 3]), [10, 30], [0, 0]).tolist() == [5, 90]


def test_weights_are_shares_of_samples():
    per_pass = samples_per_pass(make_blend(weight=[1, 3]), [10, 60], [0, 0])
    assert per_pass.tolist() == [20, 60]


def test_images_are_shares_of_images():
    # 4 images a sample against 1: the paper's 1:1 by images takes four pairs for each document.
    per_pass = samples_per_pass(make_blend(images=[1, 1]), [100, 400], [400, 400])
    assert per_pass.tolist() == [100, 400]
    per_pass = samples_per_pass(make_blend(images=[1, 1]), [100, 4000], [400, 4000])
    assert per_pass[0] * 4 == per_pass[1]


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_every_sample_occurs_in_a_pass_by_weight(weights, seed):
    sizes = np.random.default_rng(seed).integers(1, 1000, len(weights))
    per_pass = samples_per_pass(make_blend(weight=weights), sizes, sizes)
    assert (per_pass >= sizes - 1e-6).all()
    assert per_pass / per_pass.sum() == pytest.approx(np.array(weights) / sum(weights))


def test_empty_dataset_is_refused():
    with pytest.raises(ConfigError, match="d1 has no usable samples"):
        samples_per_pass(make_blend(weight=[1, 1]), [10, 0], [0, 0])


def test_share_of_images_of_text_is_refused():
    with pytest.raises(ConfigError, match="d1 has no images"):
        samples_per_pass(make_blend(images=[1, 1]), [10, 10], [10, 0])


@given(num_samples=st.integers(1, 20), cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 9))
def test_every_epoch_holds_every_sample_once_wherever_it_is_cut(num_samples, cuts, seed):
    borders = [0, *sorted(cuts), 60]
    pieces = [read_in_epochs(num_samples, a, b, (seed,)) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    stream = np.concatenate(pieces)
    assert len(stream) == 60
    for start in range(0, 60 - num_samples + 1, num_samples):
        assert sorted(stream[start : start + num_samples].tolist()) == list(range(num_samples))


def test_epochs_have_different_orders():
    stream = read_in_epochs(50, 0, 100, (1,))
    assert (stream[:50] != stream[50:]).any()
