"""Tiny vision towers of every kind: those of transformers with random weights, and ours with the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config import ModelConfig, ParallelConfig
from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.convert.family import Family, find_family
from megatron_vlm.convert.folder import HFFolder, read_json
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model, tiny_model_with_tower, tiny_run
from tests.support.jobs import train_steps

# In a tower, the norms have names of their own; in checkpoints, those of the linear modules behind them.
_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
_CLIP_SIZES = {**_SIZES, "intermediate_size": 40, "patch_size": 8}
# 7 x 7 positions; Dinov2Model resizes them to the 4 x 4 or 9 x 9 patches of the images.
_DINOV2_SIZES = {**_SIZES, "image_size": 56, "patch_size": 8, "mlp_ratio": 2, "layer_norm_eps": 1e-4}
_INTERNVL_SIZES = {**_SIZES, "intermediate_size": 40, "image_size": 32, "patch_size": 8}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVision", {**_CLIP_SIZES, "image_size": 32}),
    # 3 x 3 patches and 6 pixels that belong to none, as in so400m-384
    "siglip": ("SiglipVision", {**_CLIP_SIZES, "image_size": 30, "layer_norm_eps": 1e-4}),
    "internvit_6b": ("InternVLVision", {**_INTERNVL_SIZES, "norm_type": "rms_norm", "use_qk_norm": True}),
    "internvit_300m": ("InternVLVision", {**_INTERNVL_SIZES, "attention_bias": True, "layer_norm_eps": 1e-4}),
    "dinov2": ("Dinov2", _DINOV2_SIZES),
    "dinov2_giant": ("Dinov2", {**_DINOV2_SIZES, "use_swiglu_ffn": True}),
    "dinov2_with_registers": ("Dinov2WithRegisters", _DINOV2_SIZES),
}
"""Class in transformers and settings, by name."""


TINY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("clip", {"drop_class_token": False}),
    ("siglip", {"image_size": 38}),
    ("internvit", {}),
    ("internvit", {"normalization": "LayerNorm", "qk_layernorm": False, "add_qkv_bias": True}),
    ("dinov2", {"position_grid": 7, "feature_layer": -2}),
    ("dinov2", {"position_grid": 3, "activation": "swiglu", "num_registers": 3}),
    ("radio", {"position_grid": 6}),
    ("s2", {}),
)
"""Types of ours and settings, for `tiny_model_with_tower`: between them they have everything a tower can have."""


def tiny_models() -> list[ModelConfig]:
    """Return the tiny model with each of the `TINY` towers, whose heads two ranks can share."""
    return [tiny_model_with_tower(type, **{"num_attention_heads": 4, **settings}) for type, settings in TINY]


PACKED = ((0, 1), (2, 3), (4, 5), (6,))
UNPACKED = tuple((index,) for index in range(7))


def train_every_tower(rows: Sequence[Sequence[int]] = PACKED, **sections: Any) -> list[tuple[list[float], list[float]]]:
    """Train the tiny model with each of the `TINY` towers for two steps; return losses and gradient norms of each.

    Args:
        rows: samples of the rows of each step.
        sections: of the run.
    """
    measured, training = [], {"global_batch_size": len(rows)}
    for model in tiny_models():
        sections["training"] = {**training, **sections.get("training", {})}
        # Where a gradient is all rounding, as at the biases of keys, Adam would make a whole step of it.
        config = tiny_run(model=model, optimizer={"adam_eps": 1e-5}, **sections)
        steps = train_steps(config, [*rows, *rows], num_samples=8, num_steps=2, max_images=2)
        measured.append((steps.losses, steps.grad_norms))
    return measured


def save_published(name: str, folder: Path) -> torch.nn.Module:
    """Save a tower of transformers with random weights, no two alike, and return it."""
    import transformers

    kind, settings = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and LayerScale too: a new model has zeros and ones there, which hide a swap.
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def family_of(folder: Path) -> Family:
    """Return the family that converts the tower in a folder."""
    return find_family(read_json(folder / "config.json")["model_type"], "vision", str(folder))


def settings_of(folder: Path, **chosen: Any) -> VisionTransformerConfig:
    """Return our settings of the tower in a folder."""
    return family_of(folder).config_from_hf(read_json(folder / "config.json"), where=str(folder), **chosen)


def our_tensors(folder: Path, vision: VisionTransformerConfig, source: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return the tensors of our tower by name, made from those of transformers with the rules of the folder's family.

    Args:
        folder: says which family.
        vision: settings of the tower.
        source: tensors of transformers by name; its weights, or their gradients.
    """
    tensors = {}
    for rule in family_of(folder).rules(vision):
        for layer in rule.layers:
            key = rule.key.removeprefix("model.vision_model.")
            for ours, theirs in _NORM_KEYS.items():
                key = key.replace(theirs, ours)
            key = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            tensors[key] = rule.transform.join([source(name) for name in rule.names_of(layer)])
    return tensors


def hidden_states(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Return the hidden states of a tower of transformers, the embeddings first."""
    states: list[Tensor] = []
    encoder = getattr(model, "vision_model", model).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    handles = [
        layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *(layer.register_forward_hook(lambda _, __, output: states.append(output)) for layer in layers),
    ]
    model(pixels)
    for handle in handles:
        handle.remove()
    return tuple(state[0] if isinstance(state, tuple) else state for state in states)


def assert_equals_published(
    name: str, folder: Path, *, image_size: int | None = None, after: Callable | None = None, **chosen: Any
) -> None:
    """Compare features and all gradients of our tower and of the one of transformers with the same weights.

    Args:
        name: in `PUBLISHED`.
        folder: an empty folder.
        image_size: of the images, if it is not the size in the settings.
        after: what the features pass in transformers' model after its layers.
        chosen: our settings that the folder does not have.
    """
    published, vision = save_published(name, folder), settings_of(folder, **chosen)
    if image_size is not None:
        vision = replace(vision, image_size=image_size)
    (chunk,) = build_model(replace(tiny_model(), vision=vision), ParallelConfig(), Computation())
    tower = chunk.vision_model.eval()
    tower.load_state_dict(our_tensors(folder, vision, HFFolder(folder).read))
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size, requires_grad=True)
    state = hidden_states(published, pixels)[vision.feature_layer]
    state = state if after is None else after(published)(state)
    kept = vision.constant_grid.num_prefix_tokens
    expected = torch.cat([state[:, :kept], state[:, vision.num_prefix_tokens :]], dim=1)
    features = tower(pixels)
    assert features.shape == (3, vision.constant_grid.size, vision.feature_size)
    assert expected.std() > 0.3, "features this small would agree by themselves"
    # The same products in float32; what differs is the order of sums and the fused query, key and value.
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(features)
    ours = _gradients(tower, features, direction, pixels)
    theirs = _gradients(published, expected, direction, pixels)
    for key, gradient in {**our_tensors(folder, vision, theirs.__getitem__), "pixels": theirs["pixels"]}.items():
        # Sums over thousands of products; relative to the largest of a tensor.
        torch.testing.assert_close(ours[key] / gradient.abs().max(), gradient / gradient.abs().max(), rtol=0, atol=1e-5)


def _gradients(module: torch.nn.Module, output: Tensor, direction: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    inputs = {**dict(module.named_parameters()), "pixels": pixels}
    gradients = torch.autograd.grad(output, list(inputs.values()), direction, allow_unused=True)
    return dict(zip(inputs, gradients, strict=True))
