"""Compare the logits of a checkpoint with those of its export in transformers, each computed in its own process.

    python -m quickstart.logits write CHECKPOINT TEST_JSON NPZ
    python -m quickstart.logits compare EXPORTED_FOLDER NPZ RESULT_JSON

The second process imports none of our model code: it reads the pictures with the exported processor and loads the
weights with `LlavaForConditionalGeneration.from_pretrained`.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def choose_samples(items: Sequence[dict[str, Any]], count: int = 8) -> list[tuple[list[str], str]]:
    """Return pictures and question of each sample: 1, 2 or 3 test pictures in turn, from across the whole split."""
    pictures = list(dict.fromkeys(item["image"] for item in items))
    samples = []
    for number in range(count):
        item = items[number * len(items) // count]
        first = pictures.index(item["image"])
        num_images = min(1 + number % 3, len(pictures))
        images = [pictures[(first + offset) % len(pictures)] for offset in range(num_images)]
        samples.append((images, item["question"]))
    return samples


def write_logits(checkpoint: str, test: Path, output: Path) -> None:
    """Run our model on the samples and write token ids, picture files and logits."""
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    import torch

    from megatron_vlm.checkpoint.open_model import open_model
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.data.text.templates import find_template
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.evaluation.pictures import PictureReader
    from megatron_vlm.evaluation.prompts import Exchange, PromptFormat

    settings = read_run_settings(checkpoint)
    reader = PictureReader(settings.model.vision, settings.image_aspect)
    tokenizer, template = load_tokenizer(settings.tokenizer), find_template("vicuna_v1")
    prompts = PromptFormat(tokenizer=tokenizer, model=settings.model, template=template, system=None)
    arrays: dict[str, np.ndarray] = {}
    with open_model(settings) as model, torch.inference_mode():
        for number, (images, question) in enumerate(choose_samples(json.loads(test.read_text()))):
            input_ids = torch.from_numpy(prompts.encode([Exchange(question, len(images))]))
            places = (input_ids == settings.model.language.image_token_id).nonzero().flatten()
            pixel_values = torch.from_numpy(reader.read([Path(image) for image in images]))
            logits = model(input_ids[None], pixel_values, places, num_images=len(images))
            arrays[f"input_ids_{number}"] = input_ids[None].numpy()
            arrays[f"images_{number}"] = np.array(images)
            arrays[f"logits_{number}"] = logits[0].float().numpy()
    np.savez(output, **arrays)


def compare_logits(exported: Path, written: Path) -> list[dict[str, Any]]:
    """Run the exported model on the same token ids and pictures and return the largest difference of each sample."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, LlavaForConditionalGeneration

    processor = AutoImageProcessor.from_pretrained(str(exported))
    model = LlavaForConditionalGeneration.from_pretrained(str(exported), dtype=torch.float32).eval()
    arrays = np.load(written)
    results = []
    for number in range(sum(name.startswith("logits_") for name in arrays.files)):
        images = [Image.open(path).convert("RGB") for path in arrays[f"images_{number}"]]
        inputs = {"input_ids": torch.from_numpy(arrays[f"input_ids_{number}"])}
        inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            theirs = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0]
        ours = torch.from_numpy(arrays[f"logits_{number}"])
        theirs = theirs[:, : ours.size(-1)]  # without those of image and padding, which ours never predicts
        if theirs.shape != ours.shape:
            raise ValueError(f"logits have shape {tuple(theirs.shape)} in transformers, {tuple(ours.shape)} here")
        difference = float((theirs - ours).abs().max())
        results.append({"num_images": len(images), "num_tokens": len(ours), "max_difference": difference})
    return results


if __name__ == "__main__":
    half, *paths = sys.argv[1:]
    if half == "write":
        write_logits(paths[0], Path(paths[1]), Path(paths[2]))
    else:
        samples = compare_logits(Path(paths[0]), Path(paths[1]))
        Path(paths[2]).write_text(json.dumps(samples))
        print(f"{len(samples)} samples: largest difference {max(one['max_difference'] for one in samples):.1e}")
