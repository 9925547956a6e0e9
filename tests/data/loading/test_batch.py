"""A batch moves as a whole, and the check that other tests rely on finds fields that disagree."""

import dataclasses

import pytest
import torch

from megatron_vlm.config import IGNORE_INDEX, LanguageConfig
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.slicing import ImageShare
from tests.support.batches import validate

LANGUAGE = LanguageConfig(vocab_size=100, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
IMAGE, PAD = LANGUAGE.image_token_id, LANGUAGE.pad_token_id


def make_batch(**changes) -> VLMBatch:
    """One row of 8: a sample `1 <img> <img> 7 2`, then padding; images have 2 tokens."""
    batch = VLMBatch(
        input_ids=torch.tensor([[1, IMAGE, IMAGE, 7, 2, PAD, PAD, PAD]]),
        labels=torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 2] + [IGNORE_INDEX] * 4]),
        cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
        max_seqlen=64,
        label_index=torch.tensor([2, 3]),
        label_datasets=torch.tensor([0, 0]),
        image_token_index=torch.tensor([1, 2]),
        num_images=1,
        pixel_values=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        sample_ids=torch.tensor([0]),
        samples_per_row=torch.tensor([1]),
        dataset_samples={0: 1},
        dataset_tokens={0: 5},
        num_tokens=5,
        num_positions=8,
        attention_pairs=0,
    )
    return dataclasses.replace(batch, **changes)


def test_validate_accepts_a_sound_batch():
    validate(make_batch(), LANGUAGE, 2, ImageShare())


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
        ({"samples_per_row": torch.tensor([2])}, "samples_per_row sums to 2"),
        ({"num_tokens": 9}, "num_tokens is 9"),
        ({"input_ids": torch.full((1, 8), 102)}, "ids end at 101"),
        ({"label_index": torch.tensor([2])}, "label_index has 1 entries"),
        ({"label_datasets": torch.tensor([0])}, "1 label_datasets for 2 labels"),
        ({"labels": torch.tensor([[-100, -100, 7, IMAGE, -100, -100, -100, -100]])}, "not a token below 100"),
        ({"image_token_index": torch.tensor([1, 3])}, "image_token_index has 2 entries"),
        ({"num_images": 2}, "2 placeholders for 2 images"),
        ({"pixel_values": None}, "given together"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "expected uint8 of 1 images"),
    ],
)
def test_validate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(make_batch(**changes), LANGUAGE, 2, ImageShare())


def test_validate_refuses_a_label_across_a_sample_border():
    labels = torch.tensor([[-100, -100, 7, 2, 9, -100, -100, -100]])
    batch = make_batch(labels=labels, label_index=torch.tensor([2, 3, 4]), label_datasets=torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="of another sample"):
        validate(batch, LANGUAGE, 2, ImageShare())
