"""A plan holds every sample once per epoch, fits its rows, and is the same wherever it is built."""

import dataclasses
import json
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import BlendEntry, ConfigError, DataError, StorageError
from megatron_vlm.data.loading.collate import cut_sample
from megatron_vlm.data.plan.plan import PlanSettings, build_plan, hash_plan, open_plan, plan_rows
from megatron_vlm.data.plan.sample_pool import cut_outlines
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment

IMAGE_TOKENS = 16


class Lengths:
    """A dataset of which only the lengths exist: all text first, then all images."""

    def __init__(self, num_images, text_lengths) -> None:
        self.num_images = np.array(num_images, dtype=np.int32)
        self.text_lengths = np.array(text_lengths, dtype=np.int32)
        self.fingerprint = f"{self.num_images.tolist()} {self.text_lengths.tolist()}"

    def __len__(self) -> int:
        return len(self.num_images)

    def outlines(self, samples):
        parts = [[int(self.text_lengths[sample])] + [0] * int(self.num_images[sample]) for sample in samples]
        tokens = np.array(sum(parts, []))
        return np.cumsum([0, *map(len, parts)]), tokens == 0, tokens


def make_dataset(number: int, seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(0, 4, number), rng.integers(1, 40, number))


def make_settings(**changes) -> PlanSettings:
    base = PlanSettings(
        blend=(BlendEntry(path="a"), BlendEntry(path="b")),
        seq_length=128,
        num_image_tokens=IMAGE_TOKENS,
        packing=True,
        overflow="fail",
        seed=3,
        global_batch_size=8,
        train_iters=None,
        train_epochs=1.0,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def datasets():
    return [make_dataset(200), make_dataset(90, seed=1)]


def lengths_of(datasets) -> np.ndarray:
    return np.concatenate([dataset.num_images * IMAGE_TOKENS + dataset.text_lengths for dataset in datasets])


def counts_of(rows, datasets) -> np.ndarray:
    return np.bincount(rows.sample_ids, minlength=sum(map(len, datasets)))


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


def test_overflow_fail_names_the_longest_sample():
    datasets = [Lengths([0, 9, 0], [5, 5, 200])]
    with pytest.raises(DataError, match=r"2 samples are longer .*128; the longest has 200 tokens \(a sample 2\)"):
        plan_rows(make_settings(blend=(BlendEntry(path="a"),)), datasets)


def test_overflow_drop_leaves_long_samples_out_and_counts_them():
    datasets = [Lengths([0, 9, 0], [5, 5, 200])]
    rows = plan_rows(make_settings(blend=(BlendEntry(path="a"),), overflow="drop"), datasets)
    assert (rows.sample_ids.tolist(), rows.summary.dropped) == ([0], 2)


def test_overflow_truncate_counts_what_is_left():
    # 5 + 9 x 16 = 149: seven images fit behind the text.
    datasets = [Lengths([0, 9, 0], [5, 5, 200])]
    rows = plan_rows(make_settings(blend=(BlendEntry(path="a"),), overflow="truncate"), datasets)
    assert sorted(rows.sample_ids.tolist()) == [0, 1, 2]
    summary = rows.summary
    assert (summary.truncated, summary.num_images, summary.num_tokens) == (2, 7, 5 + (5 + 7 * 16) + 128)


def test_sample_of_which_nothing_fits_is_dropped():
    class ImageFirst(Lengths):
        def outlines(self, samples):
            assert samples.tolist() == [1]
            return np.array([0, 2]), np.array([True, False]), np.array([0, 5])

    datasets = [ImageFirst([0, 1], [5, 5])]
    plan = make_settings(blend=(BlendEntry(path="a"),), overflow="truncate", num_image_tokens=200)
    rows = plan_rows(plan, datasets)
    assert (rows.sample_ids.tolist(), rows.summary.dropped, rows.summary.truncated) == ([0], 1, 0)


def test_overflow_split_gives_every_piece_an_id_of_its_own():
    # 300 tokens of text are three pieces; 20 of text and 9 images two: 20 + 6 x 16 = 116 and 3 x 16.
    datasets = [Lengths([0, 0], [300, 5]), Lengths([9], [20])]
    rows = plan_rows(make_settings(overflow="split"), datasets)
    assert sorted(rows.sample_ids.tolist()) == [0, 1, 2, 3, 4, 5]
    assert rows.pool.lengths.tolist() == [128, 5, 116, 128, 44, 48]
    assert rows.pool.num_images.tolist() == [0, 0, 6, 0, 0, 3]
    assert rows.pool.pieces.tolist() == [[0, 0, 2], [128, 256, 116], [256, 300, 164]]
    summary = rows.summary
    assert (summary.split, summary.truncated, summary.dropped, summary.first_piece_id) == (2, 0, 0, 3)
    assert (summary.num_tokens, summary.num_images) == (300 + 5 + 164, 9)


@settings(max_examples=20, deadline=None)
@given(epochs=st.sampled_from([1, 2]), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_piece_occurs_once_per_epoch(epochs, batch, seed):
    datasets = [make_dataset(60, seed), make_dataset(40, seed=seed + 1)]
    changes = {"overflow": "split", "seq_length": 40, "train_epochs": float(epochs), "global_batch_size": batch}
    rows = plan_rows(make_settings(**changes), datasets)
    assert (np.bincount(rows.sample_ids, minlength=len(rows.pool.lengths)) == epochs).all()
    assert rows.pool.lengths.max() <= 40
    assert rows.summary.num_tokens == epochs * lengths_of(datasets).sum()


def test_image_larger_than_a_row_names_its_sample():
    datasets = [Lengths([0, 0, 1], [5, 500, 5])]
    plan = make_settings(blend=(BlendEntry(path="a"),), overflow="split", num_image_tokens=200)
    with pytest.raises(DataError, match=r"an image takes 200 tokens, data.seq_length is 128.*\(a sample 2\)"):
        plan_rows(plan, datasets)


def test_saved_pieces_are_those_of_the_plan(tmp_path):
    datasets = [Lengths([0, 0], [300, 5]), Lengths([9], [20])]
    plan = build_plan(make_settings(overflow="split"), datasets, tmp_path)
    assert [plan.pieces.find(number) for number in range(4)] == [(0, 0, 128), (1, 0, None), (2, 0, 116), (0, 128, 256)]


def test_plan_without_split_has_no_pieces(datasets, tmp_path):
    assert build_plan(make_settings(), datasets, tmp_path).pieces is None


segments = st.one_of(
    st.just(ImageSegment(b"x")),
    st.integers(1, 40).map(lambda size: TextSegment(np.zeros(size, dtype=np.int32), True)),
)


@given(samples=st.lists(st.lists(segments, min_size=1, max_size=8), min_size=1, max_size=5), limit=st.integers(0, 120))
def test_plan_cuts_where_the_batch_is_cut(samples, limit):
    expected = []
    for sample in samples:
        kept = cut_sample(EncodedSample(tuple(sample)), limit, IMAGE_TOKENS).segments
        images = sum(isinstance(segment, ImageSegment) for segment in kept)
        tokens = sum(len(segment.input_ids) for segment in kept if isinstance(segment, TextSegment))
        expected.append((images * IMAGE_TOKENS + tokens, images))
    flat = [segment for sample in samples for segment in sample]
    is_image = np.array([isinstance(segment, ImageSegment) for segment in flat])
    tokens = np.array([0 if isinstance(segment, ImageSegment) else len(segment.input_ids) for segment in flat])
    borders = np.cumsum([0, *map(len, samples)])
    found = cut_outlines(borders, is_image, tokens, limit, IMAGE_TOKENS)
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


def test_no_usable_sample_is_refused():
    with pytest.raises(ConfigError, match="a has no samples"):
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


def test_saved_plan_is_the_computed_one(datasets, tmp_path):
    plan, rows = build_plan(make_settings(), datasets, tmp_path), plan_rows(make_settings(), datasets)
    found = [plan.row(index) for index in range(rows.summary.num_rows)]
    assert np.concatenate(found).tolist() == rows.sample_ids.tolist()
    assert list(map(len, found)) == np.diff(rows.row_borders).tolist()


def test_iteration_is_its_rows_in_order(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    for iteration in range(plan.num_iterations):
        rows = [plan.row(iteration * 8 + row) for row in range(8)]
        ids, samples_per_row = plan.rows(iteration)
        assert ids.tolist() == plan.sample_ids(iteration).tolist() == np.concatenate(rows).tolist()
        assert samples_per_row.tolist() == list(map(len, rows))


def test_plan_knows_the_row_length_of_every_iteration(datasets, tmp_path):
    clustered = make_settings(packing=False, length_clustering=True)
    plan, rows = build_plan(clustered, datasets, tmp_path), plan_rows(clustered, datasets)
    assert [plan.seq_length(iteration) for iteration in range(plan.num_iterations)] == rows.seq_lengths.tolist()
    assert build_plan(make_settings(), datasets, tmp_path).seq_length(0) == 128
    with pytest.raises(IndexError, match="iteration"):
        plan.seq_length(plan.num_iterations)


def test_rows_after_the_last_sample_are_empty(datasets, tmp_path):
    plan = build_plan(make_settings(global_batch_size=64), datasets, tmp_path)
    assert plan.num_rows % 64 == 0
    sizes = [len(plan.row(index)) for index in range(plan.num_rows)]
    assert min(sizes[: plan.summary.num_rows]) > 0
    assert max(sizes[plan.summary.num_rows :], default=0) == 0


def test_second_build_opens_the_first(datasets, tmp_path):
    first = build_plan(make_settings(), datasets, tmp_path)
    written = (first.folder / "plan.json").stat().st_mtime_ns
    assert build_plan(make_settings(), datasets, tmp_path).folder == first.folder
    assert (first.folder / "plan.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.hash]


def test_what_a_killed_build_left_is_removed(datasets, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f"0123456789abcdef.{socket.gethostname()}.{gone.pid}.tmp"
    left.mkdir()
    build_plan(make_settings(), datasets, tmp_path)
    assert not left.exists()


def test_pickled_plan_carries_no_arrays(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    content = pickle.dumps(plan)
    assert len(content) < 2000
    assert pickle.loads(content).sample_ids(0).tolist() == plan.sample_ids(0).tolist()


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"seq_length": 256}, {"train_epochs": 2.0}, {"global_batch_size": 4}, {"packing": False}]
    + [
        {"overflow": "drop"},
        {"overflow": "split"},
        {"num_image_tokens": 8},
        {"sample_multiple": 2},
        {"packing": False, "length_clustering": True},
        {"blend": (BlendEntry(path="a"), BlendEntry(path="b", epochs=2))},
    ],
)
def test_hash_depends_on_every_setting(datasets, changes):
    assert hash_plan(make_settings(**changes), datasets) != hash_plan(make_settings(), datasets)


def test_data_hash_depends_on_everything_but_the_length_of_the_training(datasets, tmp_path):
    first, longer, other = (
        build_plan(make_settings(**changes), datasets, tmp_path).data_hash
        for changes in ({}, {"train_epochs": None, "train_iters": 3}, {"seed": 4})
    )
    assert first == longer != other


def test_row_multiple_matters_with_clustering_alone(datasets):
    plain, clustered = (
        {hash_plan(make_settings(packing=False, length_clustering=on, length_multiple=n), datasets) for n in (8, 16)}
        for on in (False, True)
    )
    assert (len(plain), len(clustered)) == (1, 2)


def test_hash_depends_on_the_datasets(datasets):
    assert hash_plan(make_settings(), datasets) != hash_plan(make_settings(), datasets[::-1])


def test_hash_does_not_depend_on_where_the_datasets_lie(datasets):
    moved = make_settings(blend=(BlendEntry(path="elsewhere"), BlendEntry(path="b")))
    assert hash_plan(moved, datasets) == hash_plan(make_settings(), datasets)


def test_row_outside_the_plan_is_an_index_error(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    with pytest.raises(IndexError, match="row"):
        plan.row(plan.num_rows)
    with pytest.raises(IndexError, match="iteration"):
        plan.sample_ids(plan.num_iterations)


def test_missing_plan_is_refused(datasets, tmp_path):
    with pytest.raises(DataError, match="plan is missing"):
        open_plan(make_settings(), datasets, tmp_path)


@pytest.mark.parametrize("name", ["sample_ids.npy", "row_borders.npy"])
def test_flipped_bit_of_a_plan_is_found(datasets, tmp_path, name):
    path = build_plan(make_settings(), datasets, tmp_path).folder / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"plan is damaged: {name}"):
        open_plan(make_settings(), datasets, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"summary": {}})])
def test_damaged_summary_is_found(datasets, tmp_path, text):
    path = build_plan(make_settings(), datasets, tmp_path).folder / "plan.json"
    path.write_text(text)
    with pytest.raises(DataError, match="plan is damaged"):
        open_plan(make_settings(), datasets, tmp_path)


def test_folder_that_cannot_be_written_is_one_line(datasets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="plan cannot be written"):
        build_plan(make_settings(), datasets, tmp_path / "file")
