"""Logits of a run, and a folder of the LLaVA family in transformers."""

import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ModelConfig


def random_batch(model: ModelConfig, num_images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64[1, s] with images between the text, and uint8 pixels."""
    generator = torch.Generator().manual_seed(3)
    side = model.vision.image_size
    pixels = torch.randint(0, 256, (num_images, 3, side, side), generator=generator, dtype=torch.uint8)
    image = torch.full((model.constant_image_tokens,), model.language.image_token_id)
    parts = [torch.tensor([1])]
    for _ in range(num_images):
        parts += [torch.randint(3, model.language.vocab_size, (5,), generator=generator), image]
    parts.append(torch.randint(3, model.language.vocab_size, (9,), generator=generator))
    return torch.cat(parts)[None], pixels


def our_logits(run, num_images: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, normalised pixels and float[1, s, v] logits of a run."""
    settings = read_run_settings(run)
    ids, pixels = random_batch(settings.model, num_images)
    index = (ids[0] == settings.model.language.image_token_id).nonzero()[:, 0]
    with open_model(settings) as model, torch.no_grad():
        logits = model(ids, pixels, index, num_images=pixels.size(0))
        return ids, model.vision_model.normalise(pixels), logits


def load_llava(folder) -> torch.nn.Module:
    """Load with transformers, which must not complain about a single tensor."""
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
