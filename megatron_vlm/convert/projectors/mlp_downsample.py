"""2 x 2 patches side by side, a norm and two linear layers: the projector of VILA-1.5."""

import torch
from torch import Tensor

from megatron_vlm.config.projectors.mlp_downsample import Config
from megatron_vlm.convert.projector import KEY_PREFIX, draw_linear, draw_norm
from megatron_vlm.convert.rules import Rule

FITS_LLAVA = False
# The code of VILA-1.5 gives the tokens column by column; later code has the second name for those that give them row by
# row, and reads the first one so, too.
VILA_TYPES = {
    "mlp_downsample": {"token_order": "column"},
    "mlp_downsample_2x2_fix": {"token_order": "row"},
}
_NORM, _FIRST, _SECOND = (KEY_PREFIX + name for name in ("norm.", "mlp.encoder.linear_fc1.", "mlp.encoder.linear_fc2."))


def llava(config: Config, *, input_size: int, output_size: int) -> None:
    """Return None: the class does not merge patches."""


def vila_rules(config: Config, *, input_size: int, output_size: int) -> list[Rule]:
    """Return the table; the names are the same for both orders of the tokens."""
    merged = 4 * input_size
    return [
        Rule(_NORM + "weight", (merged,), ("layers.1.weight",)),
        Rule(_NORM + "bias", (merged,), ("layers.1.bias",)),
        Rule(_FIRST + "weight", (output_size, merged), ("layers.2.weight",)),
        Rule(_FIRST + "bias", (output_size,), ("layers.2.bias",)),
        Rule(_SECOND + "weight", (output_size, output_size), ("layers.4.weight",)),
        Rule(_SECOND + "bias", (output_size,), ("layers.4.bias",)),
    ]


def draw(
    config: Config, *, input_size: int, output_size: int, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the initial weights."""
    return {
        **draw_norm(_NORM, (4 * input_size,)),
        **draw_linear(_FIRST, (output_size, 4 * input_size), std=std, generator=generator),
        **draw_linear(_SECOND, (output_size, output_size), std=std / 2**0.5, generator=generator),
    }
