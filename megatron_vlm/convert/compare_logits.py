"""Compare what two models compute on the same token ids and images: KL divergence, top-1 agreement, logits."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.config import ConfigError, ModelConfig
from megatron_vlm.convert.folder import CONFIG_NAME, read_json
from megatron_vlm.convert.opened_weights import OpenedWeights

MIN_POSITIONS = 1000
_TEXT_LENGTH = 61
_IMAGE_COUNTS = (0, 1, 2, 3)
_FIRST_PIECE = 3
"""Ids below are control tokens in SentencePiece models."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence of random text and random images."""

    input_ids: Tensor
    """int64[s], with a placeholder at every image token."""
    pixels: Tensor
    """uint8[n, 3, H, W]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitComparison:
    """How far two models are apart, over all positions of all samples."""

    num_positions: int
    num_images: int
    mean_kl: float
    """Mean KL divergence of the second model's distribution from the first one's [nats]."""
    max_kl: float
    top_1: float
    """Fraction of positions where both find the same token most likely."""
    max_difference: float
    """Largest difference of two logits."""


def reason_without_logits(weights: OpenedWeights) -> str | None:
    """Return why the logits of a model cannot be computed here; None if they can."""
    if weights.settings is not None:
        return None
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (extra hf)"
    name = _architecture(weights)
    import transformers

    return None if hasattr(transformers, name) else f"transformers has no class {name or 'for the folder'}"


def draw_samples(model: ModelConfig, seed: int, min_positions: int = MIN_POSITIONS) -> list[Sample]:
    """Draw samples with no, one, two and three images in turn until there are enough positions."""
    generator = torch.Generator().manual_seed(seed)
    side, language = model.vision.image_size, model.language
    placeholders = torch.full((model.fixed_image_tokens("a comparison of logits"),), language.image_token_id)
    samples: list[Sample] = []
    while sum(len(one.input_ids) for one in samples) < min_positions or len(samples) < len(_IMAGE_COUNTS):
        count = _IMAGE_COUNTS[len(samples) % len(_IMAGE_COUNTS)]
        texts = torch.randint(_FIRST_PIECE, language.vocab_size, (count + 1, _TEXT_LENGTH), generator=generator)
        ids = [texts[0], *(part for text in texts[1:] for part in (placeholders, text))]
        pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        samples.append(Sample(torch.cat(ids), pixels))
    return samples


def compare_logits(first: OpenedWeights, second: OpenedWeights, seed: int = 0) -> LogitComparison:
    """Run both models in float32 on the same samples, one model after the other.

    A checkpoint is run by our model; a folder by the class of transformers that its config.json names, with images
    that its own processor has normalised.

    Raises:
        ConfigError: the two models have different vocabularies or image sizes.
    """
    for what, values in (
        ("image sizes", [one.model.vision.image_size for one in (first, second)]),
        ("vocabularies", [one.model.language.vocab_size for one in (first, second)]),
    ):
        if values[0] != values[1]:
            raise ConfigError(f"the models have {what} of {values[0]} and {values[1]}", fix="compare others")
    samples = draw_samples(first.model, seed)
    theirs = list(_logits(second, samples))
    return _compare(list(_logits(first, samples)), theirs, sum(len(one.pixels) for one in samples))


def _compare(first: Sequence[Tensor], second: Sequence[Tensor], num_images: int) -> LogitComparison:
    kl, top_1, largest = [], [], 0.0
    for ours, theirs in zip(first, second, strict=True):
        log_p, log_q = (one.double().log_softmax(-1) for one in (ours, theirs))
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        top_1.append((ours.argmax(-1) == theirs.argmax(-1)).double())
        largest = max(largest, (ours - theirs).abs().max().item())
    divergences = torch.cat(kl)
    return LogitComparison(
        num_positions=len(divergences),
        num_images=num_images,
        mean_kl=divergences.mean().item(),
        max_kl=divergences.max().item(),
        top_1=torch.cat(top_1).mean().item(),
        max_difference=largest,
    )


def _logits(weights: OpenedWeights, samples: Sequence[Sample]) -> Iterator[Tensor]:
    """Yield float32[s, vocab_size] for each sample."""
    run = _run_folder if weights.settings is None else _run_checkpoint
    vocab_size = weights.model.language.vocab_size
    progress = tqdm(total=len(samples), desc=f"logits of {weights.path.name}", leave=False, disable=None)
    with progress, torch.inference_mode():
        for logits in run(weights, samples):
            progress.update()
            yield logits[:, :vocab_size].float()


def _run_checkpoint(weights: OpenedWeights, samples: Sequence[Sample]) -> Iterator[Tensor]:
    assert weights.settings is not None
    image_id = weights.model.language.image_token_id
    with open_model(weights.settings) as model:
        for one in samples:
            places = (one.input_ids == image_id).nonzero().flatten()
            yield model(one.input_ids[None], one.pixels, places, num_images=len(one.pixels))[0]


def _run_folder(weights: OpenedWeights, samples: Sequence[Sample]) -> Iterator[Tensor]:
    import transformers
    from PIL import Image

    folder = str(weights.path)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model = getattr(transformers, _architecture(weights)).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model.eval()
    for one in samples:
        inputs: dict[str, Any] = {"input_ids": one.input_ids[None]}
        if len(one.pixels):
            images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in one.pixels]
            inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
        yield model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0]


def _architecture(weights: OpenedWeights) -> str:
    names = read_json(weights.path / CONFIG_NAME).get("architectures") or [""]
    return str(names[0])
