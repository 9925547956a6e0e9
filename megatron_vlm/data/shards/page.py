"""Render samples as an HTML page: images in place, text coloured by whether it has a loss."""

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from megatron_vlm.config import UsageError
from megatron_vlm.data.images.formats import find_format
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.text.tokenizer import Tokenizer

_STYLE = """
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; line-height: 1.5; }
.sample { border: 1px solid #bbb; border-radius: 6px; padding: 1rem; margin: 1rem 0; overflow-wrap: anywhere; }
.sample img { max-width: 14rem; max-height: 14rem; vertical-align: middle; margin: 0.3rem; border: 1px solid #888; }
.trained { background: #c9ecc9; } .context { background: #e4e4e4; } .control { color: #a00; font-size: 85%; }
.text { white-space: pre-wrap; } h2 { font-size: 1rem; margin: 0 0 0.5rem; }
"""


def choose_samples(count: int, *, number: int, seed: int | None, indices: Sequence[int] = ()) -> list[int]:
    """Return the samples to show: those that are named, otherwise the first ones or, given a seed, a random choice.

    Raises:
        UsageError: a named sample does not exist.
    """
    for index in indices:
        if not 0 <= index < count:
            raise UsageError(f"sample {index} does not exist", fix=f"choose from 0 to {count - 1}")
    if indices:
        return list(indices)
    if seed is None:
        return list(range(min(number, count)))
    chosen = np.random.default_rng(seed).choice(count, size=min(number, count), replace=False)
    return sorted(int(index) for index in chosen)


def render_page(dataset: ShardedDataset, tokenizer: Tokenizer, indices: Iterable[int]) -> str:
    """Return a self-contained HTML page of samples.

    Raises:
        DataError: the shards were made with another tokenizer, or a sample is damaged.
    """
    dataset.check_tokenizer(tokenizer.facts)
    name = dataset.manifest.dataset_name
    samples = ((f"{name} sample {index}", f"sample-{index}", dataset[index]) for index in indices)
    return render_samples(f"{name}: {len(dataset)} samples", samples, tokenizer)


def render_samples(title: str, samples: Iterable[tuple[str, str, EncodedSample]], tokenizer: Tokenizer) -> str:
    """Return a self-contained HTML page of samples, each with its heading and its anchor."""
    parts = [
        f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        "<p><span class='trained'>trained</span> <span class='context'>context only</span> "
        "<span class='control'>control token</span></p>",
    ]
    parts += [_render_sample(html.escape(name), anchor, sample, tokenizer) for name, anchor, sample in samples]
    return "\n".join([*parts, "</body></html>\n"])


def _render_sample(name: str, anchor: str, sample: EncodedSample, tokenizer: Tokenizer) -> str:
    texts = [segment for segment in sample.segments if not isinstance(segment, ImageSegment)]
    tokens = sum(len(segment.input_ids) for segment in texts)
    trained = sum(len(segment.input_ids) for segment in texts if segment.train)
    images = len(sample.segments) - len(texts)
    body = []
    follows_text = False
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            file_format = find_format(segment.encoded)
            mime = file_format.media_type if file_format else "application/octet-stream"
            data = base64.b64encode(segment.encoded).decode()
            body.append(f"<img alt='image of {len(segment.encoded)} bytes' src='data:{mime};base64,{data}'>")
        else:
            kind = "trained" if segment.train else "context"
            text = _render_text(segment.input_ids, tokenizer, follows_text=follows_text)
            body.append(f"<span class='text {kind}'>{text}</span>")
        follows_text = not isinstance(segment, ImageSegment)
    head = f"{name}: {images} images, {tokens} text tokens, {trained} trained"
    return f"<div class='sample' id='{anchor}'><h2>{head}</h2>{''.join(body)}</div>"


def _render_text(input_ids: np.ndarray, tokenizer: Tokenizer, *, follows_text: bool) -> str:
    """Return the text of the token ids, with control tokens by name."""
    runs = read_text(input_ids, tokenizer, follows_text=follows_text)
    return "".join(
        f"<span class='control'>{html.escape(text)}</span>" if is_control else html.escape(text)
        for is_control, text in runs
    )


def read_text(input_ids: np.ndarray, tokenizer: Tokenizer, *, follows_text: bool) -> Iterator[tuple[bool, str]]:
    """Yield the text of token ids, and each control token by its name, with whether it is one."""
    for is_control, run in groupby(input_ids.tolist(), key=tokenizer.is_control):
        tokens = list(run)
        if is_control:
            yield from ((True, tokenizer.piece(token)) for token in tokens)
            follows_text = follows_text or tokens != [tokenizer.bos_id]
        else:
            yield False, tokenizer.decode(tokens, continuation=follows_text)
