"""2 x 2 patches side by side, then one linear layer. Neither transformers nor VILA's code has this projection."""

import torch
from torch import Tensor

from megatron_vlm.config.projectors.downsample import Config
from megatron_vlm.convert.projector import KEY_PREFIX, draw_linear

FITS_LLAVA = False
VILA_TYPES: dict[str, dict[str, str]] = {}
_LAYER = KEY_PREFIX + "encoder."


def llava(config: Config, *, input_size: int, output_size: int) -> None:
    """Return None: the class does not merge patches."""


def vila_rules(config: Config, *, input_size: int, output_size: int) -> None:
    """Return None: the code has no such projection."""


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights."""
    return draw_linear(_LAYER, (output_size, 4 * input_size), std=std, generator=generator)
