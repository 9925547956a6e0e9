"""README.md of an exported folder: what the model is, how it was trained and checked, and how it is used.

Everything in it comes from the checkpoint and its run folders, nothing from the day or the machine of the export.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.patterns import parameter_sizes
from megatron_vlm.convert.family import Described
from megatron_vlm.convert.history import Dataset, History, Stage
from megatron_vlm.platform.files.durable import write_durably

CARD_NAME = "README.md"
_CHECKS = "## Checks"
_READ_BACK = "Every file was read back after it was written."
_UNCHECKED = " Logits were not compared (`convert to-hf --verify` does it)."
_ROUNDED = " The decoder is rounded, so its logits are not those of training."


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFormat:
    """What a format adds to the card of an export."""

    title: str
    """With the program that loads the folder."""
    usage: str
    """How to use it, in Markdown."""
    library: str | None = None
    """Value of `library_name`, by which a hub knows how a folder is loaded; None: it has no name for it."""
    can_verify: bool = True
    """Whether `convert verify` reads the format."""


def write_card(folder: Path, described: Described, format: CardFormat, num_added: int | None = None) -> None:
    """Write the card.

    Args:
        folder: of the export.
        described: the model and its history.
        format: of the folder.
        num_added: parameters in the folder if it holds an adapter without its base.
    """
    stages = described.history.stages
    front: dict[str, Any] = {
        "license": "unknown",
        **({"library_name": format.library} if format.library else {}),
        "pipeline_tag": "image-text-to-text",
        "tags": ["megatron_vlm", described.model.vision.type],
    }
    if names := dict.fromkeys(dataset.name for stage in stages for dataset in stage.datasets):
        front["datasets"] = list(names)
    quantization = described.quantization
    unchecked = _UNCHECKED if format.can_verify else ""
    sections = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {format.title}",
        "Exported by megatron_vlm from a training checkpoint. This card was generated; intended use, limits and licence"
        " are for its author to add.",
        "## Model",
        _table(("part", "what"), list(_model_rows(described, num_added))),
        "## Training",
        *_training(described.history),
        _CHECKS,
        _READ_BACK + (_ROUNDED if quantization else unchecked),
        "## Use",
        *([f"The decoder is quantised: this folder needs {quantization.loaded_by}."] if quantization else []),
        format.usage.strip(),
        "## Licence",
        "Unknown: it follows from the licences of the weights that the training started from and of its data.",
    )
    (folder / CARD_NAME).write_text("\n\n".join(sections) + "\n")


def record_checks(folder: Path, lines: Sequence[str]) -> None:
    """Write the figures of a verification into the card of a folder, if it has one.

    Args:
        folder: of the export.
        lines: the figures, as `convert verify` prints them.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return
    before, mark, after = path.read_text().partition(f"{_CHECKS}\n\n")
    if not mark:
        return
    _, heading, rest = after.partition("\n\n## ")
    checks = "\n".join(
        ["Compared with the checkpoint that it was exported from:", "", *(f"- {line}" for line in lines)]
    )
    write_durably(path, (before + mark + checks + heading + rest).encode())


def _model_rows(described: Described, num_added: int | None) -> Iterator[tuple[str, str]]:
    model = described.model
    language, vision = model.language, model.vision
    yield "vision tower", f"{vision.type}, {vision.image_size} x {vision.image_size} pixels"
    yield "images", f"made square by `{described.image_aspect}`, {_image_tokens(model)}"
    yield "projection", model.projection.type
    groups = f"{language.num_attention_heads} heads, {language.query_groups} key/value heads"
    yield "decoder", f"Llama, {language.num_layers} layers, hidden size {language.hidden_size}, {groups}"
    yield "vocabulary", f"{language.vocab_size:,} tokens, and those of image and padding"
    beside = "" if num_added is None else f"; {num_added:,} are in this folder"
    yield "parameters", f"{_count_parameters(model):,}{beside}"
    if model.adapter is not None:
        yield "adapter", f"{model.adapter.type}{', merged into the weights' if num_added is None else ''}"
    rounded = f"; {described.quantization.what}" if described.quantization else ""
    yield "weights", str(described.dtype).removeprefix("torch.") + rounded


def _count_parameters(model: ModelConfig) -> int:
    """Return the parameters without those rows of the vocabulary that no token has."""
    language = model.language
    tables = 1 if language.share_embeddings_and_output_weights else 2
    unused = tables * (language.padded_vocab_size - language.num_token_ids) * language.hidden_size
    return sum(parameter_sizes(model).values()) - unused


def _image_tokens(model: ModelConfig) -> str:
    tokens = model.constant_image_tokens
    return "tokens by its size" if tokens is None else f"{tokens} tokens each"


def _training(history: History) -> Iterator[str]:
    if not history.is_complete:
        yield "The weights that the first stage below started from are not there any more; what made them is unknown."
    if not history.stages:
        yield "This checkpoint was imported, not trained here."
        return
    yield _table(
        ("stage", "iterations", "rows", "tokens", "images", "what learned", "loss"), map(_stage_row, history.stages)
    )
    yield (
        "A row of a batch holds one sample or several. Tokens and images are those trained on, repetitions included; a "
        "loss is the mean of the last 20 iterations."
    )
    yield _table(
        ("stage", "dataset", "used", "samples in it", "images in it", "text tokens in it"),
        ((stage.name, *_dataset_row(dataset)) for stage in history.stages for dataset in stage.datasets),
    )
    rows = [
        (stage.name, f"`{name}`", f"{value:.4f}")
        for stage in history.stages
        for name, value in stage.losses.items()
        if name != "loss"
    ]
    if rows:
        yield _table(("stage", "loss", "value"), rows)


def _stage_row(stage: Stage) -> tuple[str, ...]:
    numbers = (stage.iterations, stage.rows, stage.tokens, stage.images)
    loss = stage.losses.get("loss")
    return stage.name, *map(_number, numbers), stage.learned, "unknown" if loss is None else f"{loss:.4f}"


def _dataset_row(dataset: Dataset) -> tuple[str, ...]:
    return dataset.name, dataset.used, *map(_number, (dataset.samples, dataset.images, dataset.text_tokens))


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
