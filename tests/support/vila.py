"""Folders of VILA's two layouts as its own code saves them, made of transformers' classes and plain torch modules."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIDE, PATCH, WIDTH, HIDDEN = 38, 8, 24, 32
"""Of the image, of a patch [pixels]; of the tower, of the language model."""


class DownSample(nn.Module):
    """Merges 2 x 2 patches as the code of VILA-1.5 does, column by column; an odd side gets zeros."""

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.size(1) ** 0.5)
        grid = x.view(len(x), side, side, -1)
        grid = nn.functional.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
        half = (side + 1) // 2
        corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return torch.cat(corners, -1).transpose(1, 2).reshape(len(x), half * half, -1)


def projection(kind: str, width: int = WIDTH) -> nn.Module:
    """Return the layers of `mm_projector_type`."""
    linear = nn.Linear(width, HIDDEN)
    if kind == "linear":
        return linear
    if kind == "mlp2x_gelu":
        return nn.Sequential(linear, nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
    layers = [DownSample(), nn.LayerNorm(4 * width), nn.Linear(4 * width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)]
    return nn.Sequential(*layers)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill a module with random weights; norms and biases too: zeros and ones, as in a new one, would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def language_model(vocab_size: int) -> Any:
    """Return a tiny LlamaForCausalLM."""
    import transformers

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes)
    return randomise(transformers.LlamaForCausalLM(config), 1)


def tower(kind: str) -> Any:
    """Return a tiny tower of three layers, e.g. SiglipVisionModel for "Siglip"."""
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = {"image_size": SIDE, "patch_size": PATCH} if kind == "Siglip" else {"image_size": 32, "patch_size": PATCH}
    config = getattr(transformers, f"{kind}VisionConfig")(**sizes, **image)
    return randomise(getattr(transformers, f"{kind}VisionModel")(config), 2)


def save_three_folders(folder: Path, language: Any, vision: Any, layers: nn.Module, kind: str, **settings: Any) -> None:
    """Save a model as VILA-1.5 does."""
    language.save_pretrained(folder / "llm")
    vision.save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    projector = {"architectures": ["MultimodalProjector"], "mm_projector_type": kind, "model_type": "v2l_projector"}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(projector))
    named = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    save_file(named, folder / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": {"_name_or_path": "./vila/llm"},
        "vision_tower_cfg": {"_name_or_path": "./vila/vision_tower"},
        "mm_projector_cfg": {"_name_or_path": "./vila/mm_projector"},
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "model_dtype": "torch.bfloat16",
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))


def flat_tensors(language: Any, layers: nn.Module, vision: Any = None) -> dict[str, Tensor]:
    """Return the tensors of a model as VILA-1.0 and LLaVA-1.5 name them; without a tower, if it was not trained."""
    tensors = {
        **language.state_dict(),
        **{f"model.mm_projector.{name}": one for name, one in layers.state_dict().items()},
    }
    if vision is not None:
        # transformers 5 leaves out the level `vision_model`.
        level = "" if next(iter(vision.state_dict())).startswith("vision_model.") else "vision_model."
        prefix = f"model.vision_tower.vision_tower.{level}"
        tensors |= {prefix + name: one for name, one in vision.state_dict().items()}
    return tensors


def save_flat(folder: Path, tensors: dict[str, Tensor], language: Any, kind: str, **settings: Any) -> None:
    """Save a model as VILA-1.0 does, with pickled weights."""
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        **language.config.to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": WIDTH,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
