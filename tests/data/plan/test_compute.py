"""A plan holds every sample once per epoch, fits its rows, and its batches are even."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import BlendEntry, ConfigError
from megatron_vlm.data.plan.compute import plan_rows
from tests.support.lengths import Lengths, lengths_of, make_dataset, make_settings

BY_IMAGES = (BlendEntry(path="a", images=1.0), BlendEntry(path="b", images=2.0))


@pytest.fixture
def datasets():
    return [make_dataset(200), make_dataset(90, seed=1)]


def counts_of(rows, datasets) -> np.ndarray:
    return np.bincount(rows.sample_ids, minlength=sum(map(len, datasets)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "75d43e8f96e7d1bc"),
        ({"overflow": "truncate", "seq_length": 56, "train_iters": 30, "train_epochs": None}, "f46a85a707025ebf"),
        ({"overflow": "split", "seq_length": 40, "train_epochs": 2.0}, "df85b8f89408bffe"),
        ({"overflow": "drop", "seq_length": 60, "blend": BY_IMAGES}, "84a76af0111b1d8d"),
        ({"packing": False, "length_clustering": True, "length_multiple": 8}, "6ddb8fcb7222744a"),
        ({"sample_multiple": 8, "global_batch_size": 16}, "f3f71bc67fc917e3"),
    ],
)
def test_rows_are_those_of_earlier_versions(datasets, changes, expected):
    # Computed at commit 8baf407, when the tokens of an image were a constant of the model.
    rows = plan_rows(make_settings(**changes), datasets)
    digest = hashlib.sha256()
    arrays = [(rows.sample_ids, "<u4"), (rows.row_borders, "<i8"), (rows.seq_lengths, "<i4")]
    arrays += [(rows.pool.fragments, "<i8"), (rows.pool.lengths, "<i4"), (rows.pool.num_images, "<i4")]
    for array, kind in arrays:
        if array is not None:
            digest.update(array.astype(kind).tobytes())
    assert digest.hexdigest()[:16] == expected


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    epochs=st.integers(1, 3),
    packing=st.booleans(),
    batch=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_every_sample_occurs_once_per_epoch(sizes, epochs, packing, batch, seed):
    datasets = [make_dataset(sizes[0], seed), make_dataset(sizes[1], seed + 1)]
    plan = make_settings(packing=packing, train_epochs=float(epochs), global_batch_size=batch, seed=seed)
    rows = plan_rows(plan, datasets)
    assert (counts_of(rows, datasets) == epochs).all()
    assert np.add.reduceat(lengths_of(datasets)[rows.sample_ids], rows.row_borders[:-1]).max() <= 128


def test_epochs_follow_each_other(datasets):
    rows = plan_rows(make_settings(train_epochs=2.0, global_batch_size=1), datasets)
    first = rows.sample_ids[: sum(map(len, datasets))]
    assert len(set(first.tolist())) == len(first)


def test_fraction_of_an_epoch_repeats_nothing(datasets):
    rows = plan_rows(make_settings(train_epochs=0.5), datasets)
    assert counts_of(rows, datasets).max() == 1
    assert len(rows.sample_ids) == 100 + 45


def test_train_iters_fills_exactly_that_many_batches(datasets):
    rows = plan_rows(make_settings(train_iters=40, train_epochs=None), datasets)
    assert (rows.summary.num_rows, rows.summary.num_iterations) == (320, 40)
    counts = counts_of(rows, datasets)
    assert counts.max() - counts.min() <= 1


def test_longer_training_begins_with_the_same_batches(datasets):
    short, long = (plan_rows(make_settings(train_iters=n, train_epochs=None), datasets) for n in (13, 50))
    assert (long.sample_ids[: len(short.sample_ids)] == short.sample_ids).all()
    assert (long.row_borders[: len(short.row_borders)] == short.row_borders).all()


def test_without_packing_every_sample_has_a_row_of_its_own(datasets):
    rows = plan_rows(make_settings(packing=False), datasets)
    assert rows.row_borders.tolist() == list(range(291))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.tuples(st.sampled_from([3, 13, 1.0, 1.7, 2.0, 2.5]), st.sampled_from([5, 50, 1.0, 1.5, 2.0, 3.0])),
    mode=st.sampled_from(["packed", "plain", "clustered"]),
    batch=st.integers(1, 24),
    seed=st.integers(0, 99),
)
def test_stable_batches_are_alike_in_trainings_of_any_two_lengths(lengths, mode, batch, seed):
    datasets = [make_dataset(150, seed), make_dataset(70, seed=seed + 1)]
    plans = []
    for length in lengths:
        given_as = {"train_iters": length} if isinstance(length, int) else {"train_epochs": length, "train_iters": None}
        changes = {"train_epochs": None, **given_as, "global_batch_size": batch, "seed": seed}
        changes |= {"packing": mode == "packed", "length_clustering": mode == "clustered"}
        plans.append(plan_rows(make_settings(**changes), datasets))
    rows = min(plan.summary.stable_iterations for plan in plans) * batch
    first, second = plans
    assert (first.row_borders[: rows + 1] == second.row_borders[: rows + 1]).all()
    samples = first.row_borders[rows]
    assert (first.sample_ids[:samples] == second.sample_ids[:samples]).all()
    if mode == "clustered":
        assert (first.seq_lengths[: rows // batch] == second.seq_lengths[: rows // batch]).all()


def test_all_batches_of_a_training_of_so_many_iterations_are_stable(datasets):
    assert plan_rows(make_settings(train_iters=13, train_epochs=None), datasets).summary.stable_iterations == 13


def test_a_last_batch_with_empty_rows_is_not_stable(datasets):
    summary = plan_rows(make_settings(global_batch_size=64), datasets).summary
    assert summary.num_rows % 64
    assert summary.stable_iterations == summary.num_iterations - 1


def test_rows_of_a_part_of_a_pass_are_not_stable(datasets):
    one, more = (plan_rows(make_settings(train_epochs=epochs), datasets).summary for epochs in (1.0, 1.5))
    assert more.stable_iterations == one.stable_iterations < more.num_iterations


@settings(max_examples=25, deadline=None)
@given(multiple=st.sampled_from([2, 8, 16, 32]), packing=st.booleans(), seed=st.integers(0, 99))
def test_aligned_samples_fit_in_their_rows_once_each(multiple, packing, seed):
    datasets = [make_dataset(120, seed), make_dataset(50, seed=seed + 1)]
    rows = plan_rows(make_settings(sample_multiple=multiple, packing=packing, seed=seed), datasets)
    assert (counts_of(rows, datasets) == 1).all()
    aligned = -(-lengths_of(datasets) // multiple) * multiple
    assert np.add.reduceat(aligned[rows.sample_ids], rows.row_borders[:-1]).max() <= 128


def test_alignment_counts_as_padding(datasets):
    rows = plan_rows(make_settings(sample_multiple=32), datasets)
    assert rows.summary.num_tokens == lengths_of(datasets).sum()
    assert rows.summary.utilisation == lengths_of(datasets).sum() / (rows.summary.num_rows * 128)


def test_clustered_batches_have_the_length_of_their_longest_sample(datasets):
    rows = plan_rows(make_settings(packing=False, length_clustering=True, length_multiple=8), datasets)
    assert (counts_of(rows, datasets) == 1).all()
    lengths = lengths_of(datasets)[rows.sample_ids]
    for batch, seq_length in enumerate(rows.seq_lengths):
        assert seq_length == -(-lengths[8 * batch : 8 * batch + 8].max() // 8) * 8
    positions = np.repeat(rows.seq_lengths, 8)[: len(lengths)].sum()
    assert rows.summary.utilisation == lengths.sum() / positions


def test_clustering_wastes_less_than_full_rows(datasets):
    datasets = [make_dataset(2000), make_dataset(900, seed=1)]
    plain, clustered = (
        plan_rows(make_settings(packing=False, length_clustering=on, length_multiple=8), datasets).summary.utilisation
        for on in (False, True)
    )
    assert plain < 0.4
    assert clustered > 0.9


def test_weights_give_shares_of_samples(datasets):
    blend = (BlendEntry(path="a", weight=1.0), BlendEntry(path="b", weight=1.0))
    rows = plan_rows(make_settings(blend=blend), datasets)
    assert (rows.sample_ids < 200).sum() == (rows.sample_ids >= 200).sum() == 200


def test_images_give_shares_of_images(datasets):
    blend = (BlendEntry(path="a", images=1.0), BlendEntry(path="b", images=1.0))
    rows = plan_rows(make_settings(blend=blend), datasets)
    images = np.concatenate([dataset.num_images for dataset in datasets])[rows.sample_ids]
    first, second = (images[rows.sample_ids < 200].sum(), images[rows.sample_ids >= 200].sum())
    assert first == pytest.approx(second, rel=0.05)


def test_batches_are_even(datasets):
    datasets = [make_dataset(5000), make_dataset(5000, seed=1)]
    rows = plan_rows(make_settings(global_batch_size=32), datasets)
    images = np.concatenate([dataset.num_images for dataset in datasets])
    full = rows.summary.num_rows // 32 * 32
    per_row = np.add.reduceat(images[rows.sample_ids], rows.row_borders[:-1])[:full]
    batches = per_row.reshape(-1, 32).sum(axis=1)
    assert batches.max() / batches.mean() < 1.05


def test_summary_counts_what_is_there(datasets):
    rows = plan_rows(make_settings(), datasets)
    assert rows.summary.num_samples == 290
    assert rows.summary.num_tokens == lengths_of(datasets).sum()
    assert rows.summary.num_images == sum(int(dataset.num_images.sum()) for dataset in datasets)
    assert rows.summary.utilisation == lengths_of(datasets).sum() / (rows.summary.num_rows * 128)


def test_no_usable_sample_is_refused():
    with pytest.raises(ConfigError, match="a has no usable samples"):
        plan_rows(make_settings(blend=(BlendEntry(path="a"),), overflow="drop"), [Lengths([0], [500])])


@pytest.mark.parametrize(
    ("length", "least"), [({"train_iters": 10**6, "train_epochs": None}, 8), ({"train_epochs": 2.0}, 1)]
)
def test_passes_of_nearly_no_samples_are_refused_at_once(datasets, length, least):
    blend = tuple(BlendEntry(path=name, epochs=1e-6) for name in "ab")
    with pytest.raises(
        ConfigError, match=rf"a pass over data.blend has 0.00029 samples, fewer than {least}; fix: mult"
    ):
        plan_rows(make_settings(blend=blend, **length), datasets)
