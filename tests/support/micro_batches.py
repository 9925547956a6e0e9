"""A micro-batch of one sample as tensors, without a loader: images first, then text, a loss on some of it."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_vlm.config import IGNORE_INDEX, ModelConfig


@dataclass(frozen=True)
class MicroBatch:
    """Arguments of `VisionLanguageModel.forward`, and what its operations depend on."""

    arguments: dict[str, Any]
    num_tokens: int
    num_images: int
    num_labels: int


def make_micro_batch(model: ModelConfig, *, num_images: int, num_text: int, num_labels: int, seed: int = 0):
    """Return a sample of `num_images` random images and `num_text` random tokens, the last `num_labels` with a loss."""
    generator = torch.Generator().manual_seed(seed)
    side, per_image = model.vision.image_size, model.fixed_image_tokens("a test")
    text = torch.randint(3, model.language.vocab_size, (num_text,), generator=generator)
    placeholders = torch.full((num_images * per_image,), model.language.image_token_id)
    ids = torch.cat([placeholders, text])
    label_index = torch.arange(len(ids) - 1 - num_labels, len(ids) - 1)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[label_index] = ids[label_index + 1]
    arguments = {
        "input_ids": ids[None],
        "pixel_values": torch.randint(0, 256, (num_images, 3, side, side), generator=generator, dtype=torch.uint8),
        "image_token_index": torch.arange(len(placeholders)),
        "num_images": num_images,
        "labels": labels[None],
        "label_index": label_index,
    }
    return MicroBatch(arguments, len(ids), num_images, num_labels)
