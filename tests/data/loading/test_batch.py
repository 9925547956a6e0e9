"""VLMBatch checks itself, and image shares cover all images once."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import IGNORE_INDEX, LanguageConfig
from megatron_vlm.data.loading.batch import ImageShare, VLMBatch

LANGUAGE = LanguageConfig(vocab_size=100, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
IMAGE, PAD = LANGUAGE.image_token_id, LANGUAGE.pad_token_id


def make_batch(**changes) -> VLMBatch:
    """One row of 8: a sample `1 <img> <img> 7 2`, then padding; images have 2 tokens."""
    batch = VLMBatch(
        input_ids=torch.tensor([[1, IMAGE, IMAGE, 7, 2, PAD, PAD, PAD]]),
        labels=torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 2] + [IGNORE_INDEX] * 4]),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
        cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
        max_seqlen=64,
        label_index=torch.tensor([2, 3]),
        label_sources=torch.tensor([0, 0]),
        image_token_index=torch.tensor([1, 2]),
        num_images=1,
        pixel_values=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        sample_ids=torch.tensor([0]),
        num_tokens=5,
    )
    return dataclasses.replace(batch, **changes)


def test_validate_accepts_a_sound_batch():
    make_batch().validate(LANGUAGE, 2, ImageShare())


def test_loss_mask_is_one_where_there_is_a_label():
    assert make_batch().loss_mask.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]


def test_to_moves_every_tensor():
    moved = make_batch().to("meta")
    assert all(
        getattr(moved, field.name).device.type == "meta"
        for field in dataclasses.fields(moved)
        if isinstance(getattr(moved, field.name), torch.Tensor)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(1, 7, dtype=torch.long)}, "labels has shape"),
        ({"cu_seqlens": torch.tensor([0, 5, 7], dtype=torch.int32)}, "does not ascend from 0 to 8"),
        ({"max_seqlen": 4}, "longest segment has 5 tokens, max_seqlen is 4"),
        ({"position_ids": torch.arange(8)[None]}, "do not restart"),
        ({"num_tokens": 9}, "num_tokens is 9"),
        ({"input_ids": torch.full((1, 8), 102)}, "ids end at 101"),
        ({"label_index": torch.tensor([2])}, "label_index has 1 entries"),
        ({"label_sources": torch.tensor([0])}, "1 label_sources for 2 labels"),
        ({"labels": torch.tensor([[-100, -100, 7, IMAGE, -100, -100, -100, -100]])}, "not a token below 100"),
        ({"image_token_index": torch.tensor([1, 3])}, "image_token_index has 2 entries"),
        ({"num_images": 2}, "2 placeholders for 2 images"),
        ({"pixel_values": None}, "given together"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "expected uint8 of 1 images"),
    ],
)
def test_validate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make_batch(**changes).validate(LANGUAGE, 2, ImageShare())


def test_validate_refuses_a_label_across_a_sample_border():
    labels = torch.tensor([[-100, -100, 7, 2, 9, -100, -100, -100]])
    batch = make_batch(labels=labels, label_index=torch.tensor([2, 3, 4]), label_sources=torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="of another sample"):
        batch.validate(LANGUAGE, 2, ImageShare())


@given(num_images=st.integers(0, 40), size=st.integers(1, 9))
def test_image_shares_cover_every_image_once_and_in_order(num_images, size):
    owned = [index for rank in range(size) for index in range(*ImageShare(rank, size).bounds(num_images))]
    assert owned == list(range(num_images))


@given(num_images=st.integers(0, 40), size=st.integers(1, 9))
def test_no_image_share_exceeds_images_per_rank(num_images, size):
    sizes = [last - first for first, last in (ImageShare(rank, size).bounds(num_images) for rank in range(size))]
    assert max(sizes) == ImageShare(0, size).images_per_rank(num_images)


def test_image_share_refuses_a_rank_outside_the_group():
    with pytest.raises(ValueError, match="image share 2 of 2"):
        ImageShare(2, 2)
