"""Packed samples equal each sample alone, for every tower and every projection, wherever their images are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vlm.config import ModelConfig, ParallelConfig
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.slicing import ImageShare
from megatron_vlm.training.objective import packed_seq_params
from tests.support.configs import VOCAB_SIZE, tiny_model_with_tower, tiny_run
from tests.support.parts import PROJECTOR_NAMES, TOWER_NAMES, tiny_model_of
from tests.support.samples import random_picture, sample_length
from tests.support.vision_towers import TINY

MODELS = {f"{type}{list(settings.values()) or ''}": tiny_model_with_tower(type, **settings) for type, settings in TINY}
MODELS |= {projector: tiny_model_of(projector=projector) for projector in PROJECTOR_NAMES}
# float32: products of other shapes and the sums of gradients add the same numbers in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
IMAGE = 0
PACKS = {  # samples: how many tokens of text, or an image
    "no image": ([5], [9], [4]),
    "adjacent images": ([3, IMAGE, IMAGE, 4], [6]),
    "an image at the first and the last position": ([IMAGE, 5], [4, IMAGE, 3], [7, IMAGE]),
    "images of neighbouring samples meet": ([3, IMAGE], [IMAGE, 4]),
}


def samples_of(pack) -> list[PlacedSample]:
    rng = np.random.default_rng(1)

    def segment(length: int) -> TextSegment | ImageSegment:
        if length == IMAGE:
            return ImageSegment(random_picture(rng), (32, 32))
        return TextSegment(rng.integers(3, VOCAB_SIZE, length).astype(np.int32), True)

    samples = (EncodedSample(tuple(map(segment, lengths))) for lengths in pack)
    return [PlacedSample(sample, number, 0, f"sample {number}") for number, sample in enumerate(samples)]


def row_of(samples: list[PlacedSample], model: ModelConfig, *, padding: int) -> VLMBatch:
    """Return a row that ends `padding` positions behind the last sample."""
    length = sum(sample_length(placed.sample, model.constant_image_tokens) for placed in samples)
    data = replace(tiny_run(model=model).data, seq_length=length + padding)
    return collate([samples], Collation.from_config(model, data), ImageShare())


def compute(chunk: VisionLanguageModel, batch: VLMBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of all tokens, the losses of all labels, and the gradients of the sum of these losses."""
    places = {"num_images": batch.num_images, "packed_seq_params": packed_seq_params(batch)}
    arguments = (batch.input_ids, batch.pixel_values, batch.image_token_index)
    chunk.zero_grad()
    losses = chunk(*arguments, labels=batch.labels, label_index=batch.label_index, **places)[0]
    losses.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in chunk.named_parameters()}
    with torch.no_grad():
        logits = chunk(*arguments, **places)[0]
    return logits[: batch.num_tokens], losses.detach(), gradients


def assert_equal_each_alone(chunk: VisionLanguageModel, model: ModelConfig, pack, *, padding: int) -> None:
    samples = samples_of(pack)
    logits, losses, gradients = compute(chunk, row_of(samples, model, padding=padding))
    alone = [compute(chunk, row_of([sample], model, padding=0)) for sample in samples]
    torch.testing.assert_close(logits, torch.cat([one[0] for one in alone]), **CLOSE)
    torch.testing.assert_close(losses, torch.cat([one[1] for one in alone]), **CLOSE)
    for name, gradient in gradients.items():
        expected = sum(one[2][name] for one in alone)
        scale = expected.abs().max().clamp(min=1.0)  # of a weight's gradients, some are near zero
        told = {"msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(gradient / scale, expected / scale, **CLOSE, **told)


def test_every_tower_is_among_the_models():
    assert {type for type, _ in TINY} == set(TOWER_NAMES), "add tiny settings to tests/support/vision_towers.py"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_packed_samples_equal_each_alone(model, one_rank):
    (chunk,) = build_model(model, ParallelConfig(), Computation())
    for parameter in chunk.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # a new model has biases of zero, which hide a swap
    for pack in PACKS.values():
        for padding in (0, 3):  # the last sample ends at the border of the row, or before it
            assert_equal_each_alone(chunk, model, pack, padding=padding)


def test_images_in_the_wrong_order_would_be_seen(one_rank):
    model = tiny_model_of()
    (chunk,) = build_model(model, ParallelConfig(), Computation())
    batch = row_of(samples_of(PACKS["adjacent images"]), model, padding=0)
    swapped = replace(batch, pixel_values=batch.pixel_values.flip(0))
    logits = [compute(chunk, one)[0] for one in (batch, swapped)]
    assert (logits[0] - logits[1]).abs().max() > 100 * CLOSE["atol"]
