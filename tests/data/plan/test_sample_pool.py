"""Samples longer than a row are cut, split, left out or refused, and every id knows its length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import BlendEntry, ConfigError, DataError
from megatron_vlm.data.plan.compute import plan_rows
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import Outlines
from tests.support.lengths import Lengths, Questions, lengths_of, make_dataset, make_settings


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
            return Outlines(np.array([0, 2]), np.array([True, False]), np.array([False, True]), np.array([0, 5]))

    datasets = [ImageFirst([0, 1], [5, 5])]
    plan = make_settings(blend=(BlendEntry(path="a"),), overflow="truncate", image_tokens=ImageTokens(200))
    rows = plan_rows(plan, datasets)
    assert (rows.sample_ids.tolist(), rows.summary.dropped, rows.summary.truncated) == ([0], 1, 0)


def test_overflow_split_gives_every_fragment_an_id_of_its_own():
    # 300 tokens of text are three fragments; 20 of text and 9 images two: 20 + 6 x 16 = 116 and 3 x 16.
    datasets = [Lengths([0, 0], [300, 5]), Lengths([9], [20])]
    rows = plan_rows(make_settings(overflow="split"), datasets)
    assert sorted(rows.sample_ids.tolist()) == [0, 1, 2, 3, 4, 5]
    assert rows.pool.lengths.tolist() == [128, 5, 116, 128, 44, 48]
    assert rows.pool.num_images.tolist() == [0, 0, 6, 0, 0, 3]
    assert rows.pool.fragments.tolist() == [[0, 0, 2], [128, 256, 116], [256, 300, 164]]
    summary = rows.summary
    assert (summary.split, summary.truncated, summary.dropped, summary.first_fragment_id) == (2, 0, 0, 3)
    assert (summary.num_tokens, summary.num_images) == (300 + 5 + 164, 9)


@settings(max_examples=20, deadline=None)
@given(epochs=st.sampled_from([1, 2]), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_fragment_occurs_once_per_epoch(epochs, batch, seed):
    datasets = [make_dataset(60, seed), make_dataset(40, seed=seed + 1)]
    changes = {"overflow": "split", "seq_length": 40, "train_epochs": float(epochs), "global_batch_size": batch}
    rows = plan_rows(make_settings(**changes), datasets)
    assert (np.bincount(rows.sample_ids, minlength=len(rows.pool.lengths)) == epochs).all()
    assert rows.pool.lengths.max() <= 40
    assert rows.summary.num_tokens == epochs * lengths_of(datasets).sum()


def test_image_larger_than_a_row_names_its_sample():
    datasets = [Lengths([0, 0, 1], [5, 500, 5])]
    plan = make_settings(blend=(BlendEntry(path="a"),), overflow="split", image_tokens=ImageTokens(200))
    with pytest.raises(DataError, match=r"an image takes 200 tokens, data.seq_length is 128.*\(a sample 2\)"):
        plan_rows(plan, datasets)


def area(width: int, height: int) -> int:
    return width * height


BY_SIZE = ImageTokens(function=area, identity="area")


def by_hand(dataset, overflow: str, seq_length: int) -> list[list[tuple[int, int, int]]]:
    """Return tokens, images and tokens of images of every sample's fragments; text comes first, then the images."""
    sizes, found = iter((dataset.sizes[:, 0] * dataset.sizes[:, 1]).tolist()), []
    for number, text in zip(dataset.num_images.tolist(), dataset.text_lengths.tolist(), strict=True):
        fragments = [[0, 0, 0]]
        for is_image, tokens in [(False, 1)] * text + [(True, next(sizes)) for _ in range(number)]:
            if fragments[-1][0] + tokens > seq_length:
                fragments.append([0, 0, 0])
            for place, value in enumerate((tokens, is_image, tokens * is_image)):
                fragments[-1][place] += value
        found.append([tuple(fragment) for fragment in fragments[: 1 if overflow == "truncate" else None]])
    return found


@pytest.mark.parametrize("overflow", ["truncate", "split"])
@pytest.mark.parametrize("seq_length", [64, 70, 100])
def test_lengths_of_samples_with_images_of_different_lengths(overflow, seq_length):
    datasets = [make_dataset(60, seed=5), make_dataset(40, seed=6)]
    rows = plan_rows(make_settings(overflow=overflow, seq_length=seq_length, image_tokens=BY_SIZE), datasets)
    samples = [fragments for dataset in datasets for fragments in by_hand(dataset, overflow, seq_length)]
    first, further = [one[0] for one in samples], [fragment for one in samples for fragment in one[1:]]
    pool = rows.pool
    found = zip(pool.lengths.tolist(), pool.num_images.tolist(), pool.image_lengths.tolist(), strict=True)
    assert list(found) == first + further
    assert (np.bincount(rows.sample_ids, minlength=len(pool.lengths)) == 1).all()
    assert np.add.reduceat(pool.lengths[rows.sample_ids], rows.row_borders[:-1]).max() <= seq_length
    sizes = np.concatenate([dataset.sizes[:, 0] * dataset.sizes[:, 1] for dataset in datasets])
    summary = rows.summary
    assert (summary.fewest_image_tokens, summary.most_image_tokens) == (sizes.min(), sizes.max())
    assert (summary.split > 0) == (overflow == "split")
    assert (summary.truncated > 0) == (overflow == "truncate")


def test_images_longer_than_a_row_name_the_first_sample_and_the_longest():
    dataset = Lengths([1, 1, 1], [5, 5, 5])
    dataset.sizes = np.array([[8, 8], [13, 10], [20, 20]], dtype=np.uint16)
    plan = make_settings(blend=(BlendEntry(path="a"),), overflow="split", image_tokens=BY_SIZE)
    with pytest.raises(DataError, match=r"image takes 130 tokens, .*128.*\(a sample 1\); fix: raise .* to 400 or more"):
        plan_rows(plan, [dataset])


def test_image_lengths_are_known_where_every_image_has_as_many_tokens():
    datasets = [make_dataset(20), make_dataset(20, seed=1)]
    pool = plan_rows(make_settings(), datasets).pool
    assert pool.image_lengths.tolist() == (16 * pool.num_images).tolist()
    assert pool.tokens_per_image == (16, 16)


def test_datasets_without_images_have_no_tokens_an_image():
    datasets = [Lengths([0, 0], [3, 4]), Lengths([0], [5])]
    assert plan_rows(make_settings(image_tokens=BY_SIZE), datasets).pool.tokens_per_image == (0, 0)


ONE = (BlendEntry(path="a"),)


def test_truncate_leaves_out_samples_whose_answers_are_cut_off():
    # With 128 tokens a row: no answer; one token of it, which is the last that can be a label; whole; no answer
    # behind 7 images; an answer behind 7 images.
    dataset = Questions([128, 127, 5, 20, 15], [0, 0, 0, 7, 7], [50, 50, 5, 9, 9])
    rows = plan_rows(make_settings(blend=ONE, overflow="truncate"), [dataset])
    assert sorted(rows.sample_ids.tolist()) == [1, 2, 4]
    summary = rows.summary
    assert (summary.truncated, summary.dropped, summary.nothing_to_train) == (2, 0, (2,))


def test_first_token_of_a_sample_is_no_label():
    outline = Outlines(
        np.array([0, 3]), np.array([False, True, False]), np.array([True, False, True]), np.array([1, 0, 9])
    )
    dataset = Lengths([1, 0], [10, 4])
    dataset.outlines = lambda samples: outline
    rows = plan_rows(make_settings(blend=ONE, overflow="truncate", seq_length=17), [dataset])
    assert (rows.sample_ids.tolist(), rows.summary.nothing_to_train) == ([1], (1,))


def test_cut_before_the_first_image_too_many_leaves_out_samples_without_a_label():
    dataset = Questions([5, 5], [3, 1], [9, 9])
    rows = plan_rows(make_settings(blend=ONE, overflow="truncate", max_images_per_row=2), [dataset])
    assert (rows.sample_ids.tolist(), rows.summary.nothing_to_train, rows.summary.truncated) == ([1], (1,), 0)


def test_split_leaves_out_fragments_without_a_label_and_the_others_keep_their_ids():
    # 300 + 20: the third fragment has the answer; 100 + 7: fits; 128 + 1: the one token of the answer comes first.
    datasets = [Questions([300, 100], [0, 0], [20, 7]), Questions([128, 5], [0, 0], [1, 5])]
    rows = plan_rows(make_settings(overflow="split"), datasets)
    assert rows.pool.fragments.tolist() == [[0, 0, 2], [128, 256, 128], [256, 320, 129]]
    assert sorted(rows.sample_ids.tolist()) == [1, 3, 5]
    assert (rows.summary.split, rows.summary.nothing_to_train) == (2, (2, 2))


@pytest.mark.parametrize(
    ("changes", "cut"),
    [({}, "data.seq_length=128"), ({"max_images_per_row": 2}, "data.seq_length=128 and data.max_images_per_row=2")],
)
def test_dataset_of_which_nothing_can_be_trained_is_refused(changes, cut):
    datasets = [Questions([128, 500], [0, 0], [50, 50]), Questions([5], [0], [5])]
    with pytest.raises(
        ConfigError, match=f"blend entry a has nothing to train: .* at {cut}; fix: raise data.seq_length"
    ):
        plan_rows(make_settings(overflow="truncate", **changes), datasets)
