"""LoRA: its tensors, and W + alpha / rank * B A in their place."""

from collections.abc import Callable

from torch import Tensor

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.adapters.lora import TARGETS, Config, Target

LAYERS = "model.language_model.decoder.layers."
_WEIGHTS: dict[Target, str] = {
    "linear_qkv": LAYERS + "self_attention.linear_qkv.weight",
    "linear_proj": LAYERS + "self_attention.linear_proj.weight",
    "linear_fc1": LAYERS + "mlp.linear_fc1.weight",
    "linear_fc2": LAYERS + "mlp.linear_fc2.weight",
}


def weight_key(target: Target) -> str:
    """Return the key of the matrix that is adapted."""
    return _WEIGHTS[target]


def pair_keys(target: Target) -> tuple[str, str]:
    """Return the keys of A and B."""
    return f"{LAYERS}lora.{target}.a", f"{LAYERS}lora.{target}.b"


def shapes(config: Config, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all A and B, which stack the layers."""
    layers, found = model.language.num_layers, dict[str, tuple[int, ...]]()
    for target, (inputs, outputs) in zip(TARGETS, model.language.layer_matrices(), strict=True):
        if target in config.targets:
            (a, b), rank = pair_keys(target), config.rank_of(target)
            found |= {a: (layers, rank, inputs), b: (layers, outputs, rank)}
    return found


def merge(config: Config, key: str, weight: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    """Return W + alpha / rank * B A in float32, in the rows of W; another tensor as it is."""
    for target in config.targets:
        if key == weight_key(target):
            a, b = (read(pair).float() for pair in pair_keys(target))
            return weight.float() + config.scale * (b @ a)
    return weight
