"""A run folder whose checkpoint has random weights, no two alike."""

from pathlib import Path

import torch

from megatron_vlm.checkpoint.tensors import write_weights
from megatron_vlm.config import ModelConfig, config_to_dict
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.rules import Vocabulary


def write_random_run(run_dir: Path, model: ModelConfig, tokenizer: Path) -> None:
    """Write checkpoint 0 of a new run."""
    data = {"tokenizer": str(tokenizer), "image_aspect": "pad"}
    write_weights(run_dir, _random_weights(model), {"model": config_to_dict(model), "data": data})


def _random_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for rule in llava.rules(model):
        # Biases and norms too: a new model has zeros and ones there, which hide a swap.
        noise = torch.randn(rule.checkpoint_shape, generator=generator)
        is_norm = rule.key.endswith(("norm_weight", "layernorm.weight"))
        weight = 1 + 0.1 * noise if is_norm else 0.12 * noise
        if isinstance(rule.transform, Vocabulary):  # rows that no tokenizer has are not random
            weight = rule.transform.join(rule.transform.split(weight))
        tensors[rule.key] = weight
    return tensors
