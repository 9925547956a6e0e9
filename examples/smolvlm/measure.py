"""Measure a model on held-out captions, and show two measurements beside the pictures.

    python -m smolvlm.measure run CHECKPOINT_OR_RUN HELDOUT_JSON RESULT_JSON
    python -m smolvlm.measure show BEFORE_JSON AFTER_JSON PAGE_HTML

The loss is the mean over the tokens of all captions and their end [nats]: once with the right picture before each
caption, once with the next caption's. Only a model that sees can have a lower one with the right picture.
"""

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_MAX_NEW_TOKENS = 20
_STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:left}"
    "img{width:96px;height:96px;object-fit:contain}"
)


def measure(checkpoint: str, held_out: Path) -> dict[str, Any]:
    """Return the losses and the caption that the model writes for each picture."""
    from megatron_vlm.platform.device import prepare_process

    device = prepare_process()

    from megatron_vlm.checkpoint.open_model import open_model
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.config.inference import SamplingOptions
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.evaluation.answer import Generator, Prompt
    from megatron_vlm.evaluation.pictures import PictureReader

    records = json.loads(held_out.read_text())
    settings = read_run_settings(checkpoint)
    tokenizer = load_tokenizer(settings.tokenizer)
    reader = PictureReader(settings.model.vision, settings.image_aspect)
    with open_model(settings) as model, torch.inference_mode():
        generator = Generator(model, settings.model, stop_ids=[tokenizer.eos_id])
        features = generator.encode_images(reader.read([Path(one["image"]) for one in records])).to(device)
        samples = [encode(one["caption"], tokenizer, settings.model) for one in records]
        prompts = [Prompt(ids[:begin].numpy(), (number,)) for number, (ids, begin) in enumerate(samples)]
        answers = generator.generate(prompts, features, SamplingOptions(max_new_tokens=_MAX_NEW_TOKENS))
        texts = {one.number: tokenizer.decode(one.ids).strip() for one in answers}
        return {
            "loss": mean_loss(model, samples, features, settings.model),
            "loss_with_another_picture": mean_loss(model, samples, features.roll(1, 0), settings.model),
            "captions": [{**one, "written": texts[number]} for number, one in enumerate(records)],
        }


def encode(caption: str, tokenizer: Any, model: Any) -> tuple[torch.Tensor, int]:
    """Return the ids of a picture and its caption, as preparation makes them, and where the caption begins."""
    from megatron_vlm.data.documents import Document, Image, Text
    from megatron_vlm.data.samples import ImageSegment
    from megatron_vlm.data.text.encoding import encode_document

    picture = [model.language.image_token_id] * model.fixed_image_tokens("this measurement")
    segments = encode_document(Document((Image(b""), Text(caption))), tokenizer).segments
    parts = [picture if isinstance(one, ImageSegment) else one.input_ids.tolist() for one in segments]
    return torch.tensor([token for part in parts for token in part]), sum(map(len, parts[:-1]))


def mean_loss(model: Any, samples: Sequence[tuple[torch.Tensor, int]], features: torch.Tensor, config: Any) -> float:
    """Return the mean loss over all tokens of the captions [nats].

    Args:
        model: the whole model.
        samples: ids, int64[s], and where the caption begins.
        features: float[n, p, h], those of the picture of each sample.
        config: its settings.
    """
    from megatron_vlm.models.vlm import merge_image_embeddings

    total, count = 0.0, 0
    for (ids, begin), picture in zip(samples, features, strict=True):
        text = model.language_model.embedding(input_ids=ids[None], position_ids=None)
        places = (ids == config.language.image_token_id).nonzero().flatten()
        logits = model.language_model(merge_image_embeddings(text, picture, places))[0].float()
        total += torch.nn.functional.cross_entropy(logits[begin - 1 : -1], ids[begin:], reduction="sum").item()
        count += len(ids) - begin
    return total / count


def make_page(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return a page with the losses, and with each picture, its caption and what both models wrote."""
    rows = [
        "<tr><td><img src='data:image/png;base64,"
        + base64.b64encode(Path(old["image"]).read_bytes()).decode()
        + "'></td>"
        + "".join(f"<td>{html.escape(text)}</td>" for text in (old["caption"], old["written"], new["written"]))
        for old, new in zip(before["captions"], after["captions"], strict=True)
    ]
    losses = "".join(
        f"<tr><td>{name}</td><td>{one['loss']:.3f}</td><td>{one['loss_with_another_picture']:.3f}</td></tr>"
        for name, one in (("before", before), ("after", after))
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>Held-out captions</title><style>{_STYLE}</style>"
        "<h1>Held-out captions</h1><table><tr><th>training</th><th>loss [nats a token]</th>"
        f"<th>with another picture</th></tr>{losses}</table>"
        "<table><tr><th></th><th>caption</th><th>written before</th><th>written after</th></tr>"
        + "</tr>\n".join(rows)
        + "</tr></table>\n"
    )


def main() -> None:
    """Measure or show."""
    verb, *paths = sys.argv[1:]
    if verb == "run":
        result = measure(paths[0], Path(paths[1]))
        Path(paths[2]).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{paths[0]}: loss {result['loss']:.4f}, with another picture {result['loss_with_another_picture']:.4f}")
    else:
        before, after = (json.loads(Path(path).read_text()) for path in paths[:2])
        Path(paths[2]).write_text(make_page(before, after))
        for name in ("loss", "loss_with_another_picture"):
            print(f"{name.replace('_', ' ')}: {before[name]:.3f} before, {after[name]:.3f} after")
        for old, new in list(zip(before["captions"], after["captions"], strict=True))[:8]:
            print(f"  {old['caption']!r}: {old['written']!r} before, {new['written']!r} after")
        print(paths[2])


if __name__ == "__main__":
    main()
