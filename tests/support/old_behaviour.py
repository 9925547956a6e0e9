"""Faults put back on purpose, to show that a test or a report would find them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_vlm.models.vlm import VisionLanguageModel


def _encode_share(model: VisionLanguageModel, pixel_values: Tensor) -> Tensor:
    """Encode this rank's images; with none, call no module and give the weights gradients of zero, all at once."""
    if pixel_values.size(0):
        return model.vision_projection(model.vision_model(pixel_values))
    grid = model.vision_model.vision_config.constant_grid
    shape, device = (0, grid.size, model.config.hidden_size), pixel_values.device
    empty = torch.zeros(shape, dtype=model.config.params_dtype, device=device)
    parameters = [*model.vision_model.parameters(), *model.vision_projection.parameters()]
    learning = [parameter.sum() for parameter in parameters if parameter.requires_grad]
    return empty + 0 * torch.stack(learning).sum() if learning else empty


@contextmanager
def skipping_empty_shares() -> Iterator[None]:
    """Let ranks without images of their own skip tower and projection, whose weights they then neither gather nor
    reduce in the order of the other ranks."""
    real = VisionLanguageModel._encode_share
    VisionLanguageModel._encode_share = _encode_share  # type: ignore[method-assign]
    try:
        yield
    finally:
        VisionLanguageModel._encode_share = real  # type: ignore[method-assign]
