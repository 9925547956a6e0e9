"""A tiny RADIO as NVIDIA publishes it, with random weights, and what it computes in plain torch."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, LAYERS, PATCH, GRID = 24, 2, 2, 8, 6
SETTINGS: dict[str, Any] = {
    "model_type": "radio",
    "hidden_size": HIDDEN,
    "mlp_ratio": 2.0,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 32,
    "patch_size": PATCH,
    "max_img_size": GRID * PATCH,
    "num_cls_tokens": 3,
    "num_registers": 2,
    "summary_idxs": [0, 2],
}
"""config.json of transformers' RadioModel."""
_PREFIX = "radio_model.model."


def radio_tensors() -> dict[str, Tensor]:
    """Return the tensors of a file by name, no two alike."""
    sizes: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (HIDDEN, 3 * PATCH**2),
        "patch_generator.pos_embed": (1, GRID**2, HIDDEN),
        "patch_generator.cls_token.token": (5, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("norm1", HIDDEN, ()),
            ("norm2", HIDDEN, ()),
            ("attn.qkv", 3 * HIDDEN, (HIDDEN,)),
            ("attn.proj", HIDDEN, (HIDDEN,)),
            ("mlp.fc1", 2 * HIDDEN, (HIDDEN,)),
            ("mlp.fc2", HIDDEN, (2 * HIDDEN,)),
        ):
            sizes[f"blocks.{layer}.{name}.weight"] = (rows, *columns)
            sizes[f"blocks.{layer}.{name}.bias"] = (rows,)
    generator = torch.Generator().manual_seed(4)
    drawn = {_PREFIX + name: 0.3 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {**drawn, "radio_model.summary_idxs": torch.tensor([0, 2])}


def save_radio(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """Write a folder and return it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SETTINGS if settings is None else settings))
    return folder


def radio_in_plain_torch(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return float[n, 5 + p, h], all tokens after the last layer, for normalised images float[n, 3, H, W]."""
    n, rows, columns = len(images), images.size(2) // PATCH, images.size(3) // PATCH

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{_PREFIX}{name}.weight"], tensors[f"{_PREFIX}{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = (tensors[f"{_PREFIX}{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, (HIDDEN,), weight, bias, 1e-6)

    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ tensors[_PREFIX + "patch_generator.embedder.weight"].T
    table = tensors[_PREFIX + "patch_generator.pos_embed"].view(1, GRID, GRID, HIDDEN).permute(0, 3, 1, 2)
    side = max(rows, columns)
    positions = F.interpolate(table, size=(side, side), mode="bilinear")[..., :rows, :columns]
    tokens = tensors[_PREFIX + "patch_generator.cls_token.token"].expand(n, -1, -1)
    x = torch.cat([tokens, x + positions.flatten(2).transpose(1, 2)], dim=1)
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        q, k, v = (
            part.view(n, -1, HEADS, HIDDEN // HEADS).transpose(1, 2)
            for part in linear(norm(x, block + "norm1"), block + "attn.qkv").chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(2, 3) / (HIDDEN // HEADS) ** 0.5).softmax(dim=-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    return x
