"""Choose the next token from logits: the most likely one, or a draw."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlm.config import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How an answer is drawn."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this probability together."""
    seed: int = 0
    """The draws of a prompt depend on it and on the prompt's number alone, not on the batch it is in."""

    def __post_init__(self) -> None:
        for name, is_good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not is_good:
                raise UsageError(f"{name}={getattr(self, name)} makes no sense", fix=f"choose {wanted}")


def draw_uniforms(options: SamplingOptions, prompt_number: int) -> Tensor:
    """Return float64[max_new_tokens] in [0, 1): what decides the draws of one prompt."""
    generator = torch.Generator().manual_seed(hash((options.seed, prompt_number)) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)


def choose_tokens(logits: Tensor, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """Choose one token for each row.

    Args:
        logits: float[b, v].
        options: how.
        uniforms: float[b] in [0, 1): the draw of each row; not used where the temperature is 0.

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
    # A draw next to 1 may be rounded up to the sum: the last token that can be drawn is meant.
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, chosen.minimum(last)).squeeze(-1)
