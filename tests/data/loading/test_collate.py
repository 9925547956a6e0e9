"""A micro-batch holds its samples, their labels and only its share of the images."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vlm.config import (
    IGNORE_INDEX,
    BlendEntry,
    DataConfig,
    DataError,
    LanguageConfig,
    ModelConfig,
)
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate, cut_sample
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.parallel.slicing import ImageShare
from tests.support.batches import validate

LANGUAGE = LanguageConfig(vocab_size=100, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
IMAGE, PAD, NONE = LANGUAGE.image_token_id, LANGUAGE.pad_token_id, IGNORE_INDEX
NUM_IMAGE_TOKENS = 2


def make_collation(seq_length: int, sample_multiple: int = 1) -> Collation:
    return Collation(
        seq_length=seq_length,
        image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
        vocab_size=100,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        image_size=4,
        image_aspect="pad",
        image_mean=(0.5, 0.5, 0.5),
        sample_multiple=sample_multiple,
    )


def text(*ids: int, train: bool = True) -> TextSegment:
    return TextSegment(np.array(ids, dtype=np.int32), train)


def image(colour: int = 0) -> ImageSegment:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, colour, colour)).save(buffer, "PNG")
    return ImageSegment(buffer.getvalue())


def place(*segments, sample_id: int = 0, dataset: int = 0) -> PlacedSample:
    return PlacedSample(EncodedSample(tuple(segments)), sample_id, dataset, f"shard sample {sample_id}")


def make_batch(rows, seq_length: int, image_share=ImageShare(), sample_multiple: int = 1):  # noqa: B008 -- frozen
    return collate(rows, make_collation(seq_length, sample_multiple), image_share)


def test_two_packed_samples_written_out():
    rows = [[place(text(1), image(), text(7, 8)), place(text(1, 9, train=False), text(2), sample_id=5, dataset=1)]]
    batch = make_batch(rows, 10)
    assert batch.input_ids.tolist() == [[1, IMAGE, IMAGE, 7, 8, 1, 9, 2, PAD, PAD]]
    assert batch.labels.tolist() == [[NONE, NONE, 7, 8, NONE, NONE, 2, NONE, NONE, NONE]]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 10]
    assert (batch.label_index.tolist(), batch.label_datasets.tolist()) == ([2, 3, 6], [0, 0, 1])
    assert batch.image_token_index.tolist() == [1, 2]
    assert (batch.sample_ids.tolist(), batch.num_tokens, batch.num_images) == ([0, 5], 8, 1)


def test_two_aligned_samples_written_out():
    rows = [[place(text(1), image(), text(7, 8)), place(text(1, 9, train=False), text(2), sample_id=5, dataset=1)]]
    batch = make_batch(rows, 16, sample_multiple=4)
    assert batch.input_ids.tolist() == [[1, IMAGE, IMAGE, 7, 8, PAD, PAD, PAD, 1, 9, 2, PAD, PAD, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[NONE, NONE, 7, 8, NONE, NONE, NONE, NONE, NONE, 2] + [NONE] * 6]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert (batch.label_datasets.tolist(), batch.num_tokens) == ([0, 0, 1], 8)
    assert (batch.dataset_samples, batch.dataset_tokens) == ({0: 1, 1: 1}, {0: 5, 1: 3})


def test_tensors_have_the_agreed_types():
    batch = make_batch([[place(text(1), image(), text(7))]], 8)
    for name in (
        "input_ids",
        "labels",
        "label_index",
        "label_datasets",
        "image_token_index",
        "sample_ids",
    ):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.pixel_values.dtype == torch.uint8


def test_samples_of_each_row_are_counted():
    batch = make_batch([[place(text(1, 5)), place(text(1), sample_id=4)], [], [place(text(1, 6, 7), sample_id=2)]], 4)
    assert (batch.sample_ids.tolist(), batch.samples_per_row.tolist()) == ([0, 4, 2], [2, 0, 1])


def test_rows_follow_each_other_with_their_own_padding():
    batch = make_batch([[place(text(1, 5))], [place(text(1, 6, 7))]], 4)
    assert batch.input_ids.tolist() == [[1, 5, PAD, PAD, 1, 6, 7, PAD]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 7, 8]


def cut(rows, seq_length: int, position_multiple: int, sample_multiple: int = 1):
    collation = make_collation(seq_length, sample_multiple)
    return collate(rows, dataclasses.replace(collation, position_multiple=position_multiple), ImageShare())


def test_positions_behind_the_samples_of_each_row_are_left_out():
    batch = cut([[place(text(1, 5))], [], [place(text(1, 6, 7))]], 4, 1)
    assert batch.input_ids.tolist() == [[1, 5, 1, 6, 7]]
    assert batch.labels.tolist() == [[5, NONE, 6, 7, NONE]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert (batch.num_tokens, batch.num_positions) == (5, 12)


def test_the_micro_batch_is_filled_up_to_the_multiple():
    batch = cut([[place(text(1, 5))], [place(text(1, 6, 7))]], 4, 4)
    assert batch.input_ids.tolist() == [[1, 5, 1, 6, 7, PAD, PAD, PAD]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 8]


@pytest.mark.parametrize("multiple", [1, 4])
def test_rows_without_samples_keep_as_many_positions_as_the_multiple(multiple):
    batch = cut([[], []], 8, multiple)
    assert batch.input_ids.tolist() == [[PAD] * multiple]
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.num_positions == 16
    validate(batch, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())


def of_samples(batch):
    """Return tokens, labels and datasets of each segment that holds a sample."""
    lengths = batch.cu_seqlens.diff().tolist()
    segments = zip(batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True)
    return [(ids.tolist(), labels.tolist()) for ids, labels in segments if ids[0] != PAD]


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4), st.integers(1, 5))
def test_leaving_positions_out_keeps_every_sample_as_it_is(rows, multiple):
    placed = [[place(image(), text(*range(3, 3 + size))) for size in row] for row in rows]
    sample_multiple = 2 if multiple % 2 == 0 else 1
    full = make_batch(placed, 24, sample_multiple=sample_multiple)
    short = cut(placed, 24, multiple, sample_multiple)
    validate(short, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())
    assert of_samples(short) == of_samples(full)
    assert short.input_ids.numel() % multiple == 0
    assert short.input_ids.numel() <= sum(len(ids) for ids, _ in of_samples(full)) + multiple
    assert torch.equal(short.label_datasets, full.label_datasets)
    assert torch.equal(short.pixel_values, full.pixel_values)


def test_first_token_is_never_a_target():
    batch = make_batch([[place(text(1, 5)), place(text(1, 6))]], 4)
    assert batch.labels.tolist() == [[5, NONE, 6, NONE]]


def test_context_tokens_are_no_targets():
    batch = make_batch([[place(text(1, 5, train=False), text(6, 7), text(8, train=False))]], 5)
    assert batch.labels.tolist() == [[NONE, 6, 7, NONE, NONE]]


def test_last_image_position_predicts_the_text_behind_it():
    batch = make_batch([[place(text(1), image(), text(7))]], 4)
    assert batch.labels.tolist() == [[NONE, NONE, 7, NONE]]


def test_empty_row_is_one_segment_of_padding():
    batch = make_batch([[]], 4)
    assert batch.input_ids.tolist() == [[PAD] * 4]
    assert (batch.cu_seqlens.tolist(), batch.num_tokens, len(batch.label_index)) == ([0, 4], 0, 0)


def test_batch_without_images_has_no_pixels():
    batch = make_batch([[place(text(1, 5))]], 4)
    assert batch.pixel_values.shape == (0, 3, 4, 4)


def test_share_is_decoded_in_reading_order():
    rows = [[place(text(1), image(10), image(20)), place(text(1), image(30))]]
    batch = make_batch(rows, 10, ImageShare(0, 2))
    assert batch.num_images == 3
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [10, 20]
    assert make_batch(rows, 10, ImageShare(1, 2)).pixel_values[:, 0, 0, 0].tolist() == [30]


def test_images_of_other_ranks_are_not_decoded():
    rows = [[place(text(1), image(10), ImageSegment(b"broken"))]]
    assert len(make_batch(rows, 10, ImageShare(0, 2)).pixel_values) == 1


@pytest.mark.parametrize(
    ("lengths", "seq_length", "expected"),
    [
        ([20], 100, 128),  # the padding of 80 is the longest segment
        ([70, 58], 128, 128),
        ([128], 128, 128),
        ([65, 100], 192, 128),
    ],
)
def test_max_seqlen_is_the_longest_segment_rounded_up_to_a_multiple_of_64(lengths, seq_length, expected):
    batch = make_batch([[place(text(*[5] * length)) for length in lengths]], seq_length)
    assert batch.max_seqlen == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, []),
        (1, [1]),
        (2, [1]),
        (3, [1, "image"]),
        (4, [1, "image", 7]),
        (5, [1, "image", 7, 8]),
        (9, [1, "image", 7, 8]),
    ],
)
def test_sample_is_cut_behind_the_last_whole_image_and_token(limit, expected):
    sample = EncodedSample((text(1), image(), text(7, 8)))
    found = []
    for segment in cut_sample(sample, limit, ImageTokens(NUM_IMAGE_TOKENS)).segments:
        found += ["image"] if isinstance(segment, ImageSegment) else segment.input_ids.tolist()
    assert found == expected


def test_nothing_follows_an_image_that_does_not_fit():
    sample = EncodedSample((text(1, 2), image(), text(7)))
    assert len(cut_sample(sample, 3, ImageTokens(NUM_IMAGE_TOKENS)).segments) == 1


def test_sample_longer_than_a_row_fills_it():
    batch = make_batch([[place(text(1, 5, 6, 7, 8))]], 3)
    assert batch.input_ids.tolist() == [[1, 5, 6]]
    assert batch.labels.tolist() == [[5, 6, NONE]]


def test_samples_that_do_not_fit_in_their_row_are_refused():
    with pytest.raises(DataError, match=r"2 tokens more than its length of 4 \(shard sample 3\)"):
        make_batch([[place(text(1, 5, 6)), place(text(1, 5, 6), sample_id=3)]], 4)


@pytest.mark.parametrize("token", [-1, 100])
def test_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(DataError, match=r"the vocabulary has 100 \(shard sample 2\)"):
        make_batch([[place(text(1, token), sample_id=2)]], 4)


def test_broken_image_names_its_sample():
    with pytest.raises(DataError, match=r"not a JPEG.*\(shard sample 2\)"):
        make_batch([[place(text(1), ImageSegment(b"broken"), sample_id=2)]], 4)


def test_image_that_preparation_took_is_not_refused_again():
    buffer = io.BytesIO()
    Image.new("RGB", (200, 2)).save(buffer, "PNG")
    assert make_batch([[place(text(1), ImageSegment(buffer.getvalue()))]], 4).num_images == 1


segments = st.one_of(
    st.builds(text, st.integers(3, 99), st.integers(3, 99), train=st.booleans()), st.builds(image, st.integers(0, 255))
)
samples = st.lists(segments, max_size=3).map(lambda parts: [text(1), *parts])


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(samples, max_size=4), min_size=1, max_size=3), multiple=st.sampled_from([1, 2, 4, 8]))
def test_batch_equals_its_samples_one_by_one(rows, multiple):
    placed = [[place(*parts) for parts in row] for row in rows]
    batch = make_batch(placed, 64, sample_multiple=multiple)
    validate(batch, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())
    assert (batch.cu_seqlens % multiple == 0).all()
    assert batch.num_tokens == int((batch.input_ids != PAD).sum())
    for row, row_start in zip(placed, range(0, 64 * len(rows), 64), strict=True):
        position = row_start
        for sample in row:
            alone = make_batch([[sample]], 64)
            size = alone.num_tokens
            here = slice(position, position + size)
            for name in ("input_ids", "labels"):
                assert torch.equal(getattr(batch, name)[0, here], getattr(alone, name)[0, :size]), name
            end = position + -(-size // multiple) * multiple
            assert (batch.input_ids[0, position + size : end] == PAD).all()
            assert (batch.labels[0, position + size : end] == NONE).all()
            assert {position, end} <= set(batch.cu_seqlens.tolist())
            position = end
        assert (batch.input_ids[0, position : row_start + 64] == PAD).all()


def test_collation_follows_the_settings():
    vision = ClipConfig(image_size=28, num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    data = DataConfig(
        tokenizer="t", blend=(BlendEntry(path="d"),), seq_length=32, image_aspect="square", sample_multiple=8
    )
    collation = Collation.from_config(ModelConfig(language=LANGUAGE, vision=vision), data)
    assert (collation.image_tokens.constant, collation.image_size, collation.image_aspect) == (4, 28, "square")
    assert (collation.image_token_id, collation.pad_token_id, collation.seq_length) == (IMAGE, PAD, 32)
    assert collation.sample_multiple == 8


def test_images_of_different_lengths_get_as_many_placeholders_each():
    collation = dataclasses.replace(make_collation(16), image_tokens=ImageTokens(function=lambda width, height: width))
    sizes = [(3, 1), (1, 3), (4, 2)]
    images = [image(number)._replace(size=size) for number, size in enumerate(sizes)]
    batch = collate(
        [[place(text(1), images[0], text(7), images[1]), place(images[2], text(9))]], collation, ImageShare()
    )
    assert batch.input_ids[0, :11].tolist() == [1, *[IMAGE] * 3, 7, IMAGE, *[IMAGE] * 4, 9]
    assert batch.image_token_index.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert (batch.image_lengths, batch.num_images, len(batch.pixel_values)) == ((3, 1, 4), 3, 3)
    assert batch.to("cpu").image_lengths == (3, 1, 4)


def test_images_of_one_length_have_no_list_of_lengths():
    assert make_batch([[place(text(1), image())]], 8).image_lengths is None
