"""Save tiny models with random weights by the transformers of this interpreter, and what they compute.

    python published_folders.py OUTPUT < cases.json

A case is [name, kind, settings]: `LlamaForCausalLM` and the like are kinds; `settings` is its config. The script knows
nothing of this project, so that an environment with another version of transformers runs it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

NUM_POSITIONS = 1200
NUM_IMAGES = 4


def save(name: str, kind: str, settings: dict[str, Any], output: Path) -> None:
    """Write OUTPUT/name, and OUTPUT/name.safetensors with inputs and logits if it is a model with a vocabulary."""
    stem = kind.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").removesuffix("Model")
    config_class = getattr(transformers, f"{stem}Config")
    if kind.startswith("Llava"):
        text, vision = (settings.pop(part) for part in ("text_config", "vision_config"))
        settings |= {"text_config": transformers.LlamaConfig(**text)}
        settings |= {"vision_config": transformers.CLIPVisionConfig(**vision)}
    model = getattr(transformers, kind)(config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Norms and biases, too: a new model has ones and zeros there, which hide a swap.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in key and key.endswith("weight") else 0.15 * noise)
            if kind == "RadioModel" and "layer_scale" in key:  # published ones have none: transformers writes ones
                parameter.fill_(1.0)
    model.save_pretrained(output / name)
    if hasattr(model, "lm_head"):
        ids, pixels = _inputs(model.config, generator)
        inputs = {"input_ids": ids} if pixels is None else {"input_ids": ids, "pixel_values": _normalised(pixels)}
        with torch.no_grad():
            kept = {"input_ids": ids, "logits": model(**inputs).logits.contiguous()}
        save_file(kept if pixels is None else {**kept, "pixels": pixels}, output / f"{name}.safetensors")


def _inputs(config: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return int64[1, s] of one sequence and, for a whole model, uint8[n, 3, H, W] of the images in it."""
    if not hasattr(config, "vision_config"):
        return torch.randint(3, config.vocab_size, (1, NUM_POSITIONS), generator=generator), None
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    text = torch.randint(3, config.image_token_index, (NUM_IMAGES, NUM_POSITIONS // NUM_IMAGES), generator=generator)
    image = torch.full((NUM_IMAGES, (side // patch) ** 2), config.image_token_index)
    ids = torch.cat([text[:, :7], image, text[:, 7:]], dim=1).view(1, -1)
    return ids, torch.randint(0, 256, (NUM_IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels as CLIP takes them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def main() -> None:
    """Save every case that this version of transformers has a class for."""
    transformers.logging.set_verbosity_error()
    for name, kind, settings in json.load(sys.stdin):
        if hasattr(transformers, kind):
            save(name, kind, settings, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
