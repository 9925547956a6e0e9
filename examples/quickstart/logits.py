"""Logits of the checkpoint beside those of its export in transformers, each in a process of its own.

    python -m quickstart.logits write CHECKPOINT TEST_JSON OUTPUT_NPZ
    python -m quickstart.logits compare EXPORTED_FOLDER OUTPUT_NPZ RESULT_JSON

The second process imports transformers and nothing of the model code: it reads the pictures with the exported
processor and the weights with `LlavaForConditionalGeneration.from_pretrained`.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUM_SAMPLES = 8
_MAX_IMAGES = 3


def choose_samples(items: Sequence[dict[str, Any]], count: int = NUM_SAMPLES) -> list[tuple[list[str], str]]:
    """Return pictures and question of each sample: in turn 1, 2 and 3 different test pictures, over the whole split."""
    pictures = list(dict.fromkeys(item["image"] for item in items))
    samples = []
    for number in range(count):
        item = items[number * len(items) // count]
        first = pictures.index(item["image"])
        num_images = min(1 + number % _MAX_IMAGES, len(pictures))
        images = [pictures[(first + offset) % len(pictures)] for offset in range(num_images)]
        samples.append((images, item["question"]))
    return samples


def write_logits(checkpoint: str, test: Path, output: Path) -> None:
    """Run our model on the samples and keep token ids, picture files and logits."""
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    import torch

    from megatron_vlm.checkpoint.open_model import open_model
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.data.text.tokenizer import load_tokenizer

    settings = read_run_settings(checkpoint)
    tokenizer = load_tokenizer(settings.tokenizer)
    arrays: dict[str, np.ndarray] = {}
    with open_model(settings) as model, torch.inference_mode():
        for number, (images, question) in enumerate(choose_samples(json.loads(test.read_text()))):
            batch = _make_batch(settings, tokenizer, images, question)
            logits = model(batch.input_ids, batch.pixel_values, batch.image_token_index, num_images=batch.num_images)
            arrays[f"input_ids_{number}"] = batch.input_ids.numpy()
            arrays[f"images_{number}"] = np.array(images)
            arrays[f"logits_{number}"] = logits[0].float().numpy()
    np.savez(output, **arrays)


def _make_batch(settings: Any, tokenizer: Any, images: Sequence[str], question: str) -> Any:
    """Return a micro-batch of one prompt without padding."""
    from megatron_vlm.config import BlendEntry, DataConfig
    from megatron_vlm.data.documents import Image
    from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate
    from megatron_vlm.data.samples import EncodedSample, ImageSegment
    from megatron_vlm.data.text.templates import PLACEHOLDER, Turn, encode_prompt, find_template, split_placeholders
    from megatron_vlm.parallel.slicing import ImageShare

    text = f"{PLACEHOLDER}\n" * len(images) + question
    turn = Turn(split_placeholders(text, [Image(Path(image).read_bytes()) for image in images]), None)
    segments = encode_prompt([turn], tokenizer, template=find_template("vicuna_v1"), system=None)
    num_image_tokens = settings.model.fixed_image_tokens("this check")
    length = sum(
        num_image_tokens if isinstance(segment, ImageSegment) else len(segment.input_ids) for segment in segments
    )
    data = DataConfig(
        tokenizer=str(settings.tokenizer),
        blend=(BlendEntry(path="none"),),
        seq_length=length,
        image_aspect=settings.image_aspect,
    )
    placed = PlacedSample(EncodedSample(segments), sample_id=0, dataset=0, where=question)
    return collate([[placed]], Collation.from_config(settings.model, data), ImageShare(0, 1))


def compare_logits(exported: Path, written: Path) -> list[dict[str, Any]]:
    """Run the exported model on the same token ids and pictures and return the largest difference of each sample."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, LlavaForConditionalGeneration

    processor = AutoImageProcessor.from_pretrained(str(exported))
    model = LlavaForConditionalGeneration.from_pretrained(str(exported), dtype=torch.float32).eval()
    arrays = np.load(written)
    results = []
    for number in range(sum(name.startswith("logits_") for name in arrays.files)):
        images = [Image.open(path).convert("RGB") for path in arrays[f"images_{number}"]]
        input_ids = torch.from_numpy(arrays[f"input_ids_{number}"])
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            theirs = model(
                input_ids=input_ids, pixel_values=pixel_values, attention_mask=torch.ones_like(input_ids)
            ).logits[0]
        ours = torch.from_numpy(arrays[f"logits_{number}"])
        if theirs.shape != ours.shape:
            raise ValueError(f"logits have shape {tuple(theirs.shape)} in transformers, {tuple(ours.shape)} here")
        results.append(
            {
                "num_images": len(images),
                "num_tokens": input_ids.shape[1],
                "largest": float(ours.abs().max()),
                "max_difference": float((theirs - ours).abs().max()),
            }
        )
    return results


def main() -> None:
    """Run one of the two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("write", "compare"))
    parser.add_argument("model")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    if args.half == "write":
        write_logits(args.model, args.source, args.output)
    else:
        args.output.write_text(json.dumps(compare_logits(Path(args.model), args.source)))


if __name__ == "__main__":
    main()
