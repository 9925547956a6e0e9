"""Choose the next token from logits: the most likely one, or a draw."""

import torch
from torch import Tensor

from megatron_vlm.config.inference import SamplingOptions


def draw_uniforms(options: SamplingOptions, prompt_number: int) -> Tensor:
    """Return float64[max_new_tokens] in [0, 1), which decide the draws of one prompt."""
    generator = torch.Generator().manual_seed(hash((options.seed, prompt_number)) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)


def choose_tokens(logits: Tensor, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """Choose one token for each row.

    Args:
        logits: float[b, v].
        options: how tokens are chosen.
        uniforms: float[b] in [0, 1), the draw of each row; ignored at temperature 0.

    Returns:
        int64[b].
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    scaled, order = (logits.double() / options.temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = scaled.softmax(-1)
    if options.top_k:
        probabilities[:, options.top_k :] = 0
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < options.top_p, probabilities, 0)
    cumulative = probabilities.cumsum(-1)
    chosen = (cumulative <= uniforms[:, None].to(cumulative) * cumulative[:, -1:]).sum(-1, keepdim=True)
    # Rounding can lift a draw close to 1 to the sum itself: then take the last token with any probability.
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, chosen.minimum(last)).squeeze(-1)
