"""A run folder whose checkpoint has random weights, no two alike."""

from pathlib import Path

import torch

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import read_tensor, write_weights
from megatron_vlm.config import ModelConfig, config_to_dict
from megatron_vlm.convert.adapter import find_adapter
from megatron_vlm.convert.families import vila
from megatron_vlm.convert.rules import Vocabulary


def write_random_run(run_dir: Path, model: ModelConfig, tokenizer: Path) -> None:
    """Write checkpoint 0 of a new run."""
    data = {"tokenizer": str(tokenizer), "image_aspect": "pad"}
    write_weights(run_dir, _random_weights(model), {"model": config_to_dict(model), "data": data})


def write_random_adapter(
    run_dir: Path, base: Path, model: ModelConfig, tokenizer: Path, *, learned: str = "vision_projection"
) -> None:
    """Write checkpoint 0 of a new run with random weights of the adapter, and of the base's tensors of a part."""
    generator = torch.Generator().manual_seed(6)
    shapes = dict(find_adapter(model.adapter).shapes(model.adapter, model))
    tensors = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for rule in vila.rules(model):
        if learned and rule.key.startswith(f"model.{learned}."):
            tensors[rule.key] = 1.1 * read_tensor(find_checkpoint(base), rule.key)
    data = {"tokenizer": str(tokenizer), "image_aspect": "pad"}
    write_weights(run_dir, tensors, {"model": config_to_dict(model), "data": data}, base=find_checkpoint(base))


def _random_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for rule in vila.rules(model):
        # Biases and norms too: a new model has zeros and ones there, which hide a swap.
        noise = torch.randn(rule.checkpoint_shape, generator=generator)
        is_norm = rule.key.endswith(("norm_weight", "layernorm.weight"))
        weight = 1 + 0.1 * noise if is_norm else 0.12 * noise
        if isinstance(rule.transform, Vocabulary):  # rows that no tokenizer has are not random
            weight = rule.transform.join(rule.transform.split(weight))
        tensors[rule.key] = weight
    return tensors
