"""Check a micro-batch on the host."""

import torch

from megatron_vlm.config import IGNORE_INDEX, LanguageConfig
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.slicing import ImageShare


def validate(batch: VLMBatch, language: LanguageConfig, num_image_tokens: int, image_share: ImageShare | None) -> None:
    """Check that the fields of a batch agree with each other.

    Args:
        language: names the placeholder, the padding and the vocabulary.
        num_image_tokens: placeholders of one image, where they do not vary.
        image_share: the share that was asked for; None: no pixels.

    Raises:
        ValueError: two fields disagree; names them with the numbers.
    """
    _validate_segments(batch)
    _validate_ids(batch, language)
    _validate_images(batch, language, num_image_tokens, image_share)


def _validate_segments(batch: VLMBatch) -> None:
    size = batch.input_ids.shape[1]
    for name in ("input_ids", "labels"):
        shape = tuple(getattr(batch, name).shape)
        if shape != (1, size):
            raise ValueError(f"{name} has shape {shape}, expected {(1, size)}")
    borders = batch.cu_seqlens.long()
    lengths = borders.diff()
    if borders[0] != 0 or borders[-1] != size or (lengths <= 0).any():
        raise ValueError(f"cu_seqlens does not ascend from 0 to {size}: {borders.tolist()[:16]}")
    if int(lengths.max()) > batch.max_seqlen:
        raise ValueError(f"longest segment has {int(lengths.max())} tokens, max_seqlen is {batch.max_seqlen}")
    if int(batch.samples_per_row.sum()) != len(batch.sample_ids):
        raise ValueError(
            f"{len(batch.sample_ids)} sample_ids, samples_per_row sums to {int(batch.samples_per_row.sum())}"
        )
    if not 0 <= batch.num_tokens <= size:
        raise ValueError(f"num_tokens is {batch.num_tokens}, the batch has {size} positions")


def _validate_ids(batch: VLMBatch, language: LanguageConfig) -> None:
    low, high = int(batch.input_ids.min()), int(batch.input_ids.max())
    if low < 0 or high > language.pad_token_id:
        raise ValueError(f"input_ids reach from {low} to {high}; ids end at {language.pad_token_id}")
    trained = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    if not torch.equal(batch.label_index, trained):
        raise ValueError(f"label_index has {len(batch.label_index)} entries, labels have {len(trained)} with a loss")
    if len(batch.label_datasets) != len(batch.label_index):
        raise ValueError(f"{len(batch.label_datasets)} label_datasets for {len(batch.label_index)} labels")
    if (batch.labels[0, trained] >= language.vocab_size).any():
        raise ValueError(f"a label is not a token below {language.vocab_size}")
    last = batch.cu_seqlens.long()[1:] - 1
    if (batch.labels[0, last] != IGNORE_INDEX).any():
        raise ValueError("the last position of a segment has a label, which is of another sample")


def _validate_images(
    batch: VLMBatch, language: LanguageConfig, num_image_tokens: int, image_share: ImageShare | None
) -> None:
    placeholders = (batch.input_ids[0] == language.image_token_id).nonzero()[:, 0]
    if not torch.equal(batch.image_token_index, placeholders):
        raise ValueError(
            f"image_token_index has {len(batch.image_token_index)} entries, input_ids {len(placeholders)} placeholders"
        )
    if batch.image_lengths is not None:
        if (len(batch.image_lengths), sum(batch.image_lengths)) != (batch.num_images, len(placeholders)):
            raise ValueError(f"{len(placeholders)} placeholders for images of {batch.image_lengths} tokens")
    elif len(placeholders) != batch.num_images * num_image_tokens:
        raise ValueError(f"{len(placeholders)} placeholders for {batch.num_images} images of {num_image_tokens} tokens")
    if image_share is None or batch.pixel_values is None:
        if (image_share is None) != (batch.pixel_values is None):
            raise ValueError("pixel_values and image_share must be given together")
        return
    first, last = image_share.bounds(batch.num_images)
    if len(batch.pixel_values) != last - first or batch.pixel_values.dtype != torch.uint8:
        raise ValueError(
            f"pixel_values is {batch.pixel_values.dtype}{list(batch.pixel_values.shape)}, "
            f"expected uint8 of {last - first} images"
        )
