"""A checkpoint opened to answer prompts, with the prompt format and image processing of its training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ConfigError
from megatron_vlm.config.inference import BARE_TEXT, ModelOptions
from megatron_vlm.data.text.templates import find_system, find_template, stop_ids
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.evaluation.answer import POSITIONS_PER_BATCH, Generator
from megatron_vlm.evaluation.pictures import PictureReader
from megatron_vlm.evaluation.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that answers, with the format of its prompts and the reader of its images."""

    generator: Generator
    prompt_format: PromptFormat
    reader: PictureReader
    checkpoint: str


@contextmanager
def opened_model(
    checkpoint: str, options: ModelOptions, device: torch.device, batch_positions: int | None = None
) -> Iterator[OpenedModel]:
    """Open a checkpoint.

    Args:
        checkpoint: a checkpoint, or a run folder for its newest checkpoint.
        options: how prompts are written, and how the model computes.
        device: the device of this process, from `prepare_process`.
        batch_positions: positions answered together; None: the generator's default.

    Raises:
        ConfigError: the tokenizer does not belong to the model or the template, or the template is unknown.
        CheckpointError: the checkpoint is missing or damaged.
    """
    settings = read_run_settings(checkpoint, tokenizer=options.tokenizer, image_aspect=options.image_aspect)
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.vocab_size != settings.model.language.vocab_size:
        raise ConfigError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model {settings.model.language.vocab_size}",
            where=str(settings.tokenizer),
            fix="name the tokenizer used in training with --tokenizer",
        )
    template = None if options.template == BARE_TEXT else find_template(options.template)
    prompt_format = PromptFormat(
        tokenizer=tokenizer,
        model=settings.model,
        template=template,
        system=find_system(options.system),
    )
    with open_model(settings, options.precision or ("fp32" if device.type == "cpu" else "bf16")) as model:
        yield OpenedModel(
            generator=Generator(
                model,
                settings.model,
                stop_ids=stop_ids(template, tokenizer),
                positions_per_batch=batch_positions or POSITIONS_PER_BATCH,
            ),
            prompt_format=prompt_format,
            reader=PictureReader(settings.model.vision, settings.image_aspect),
            checkpoint=str(settings.checkpoint),
        )
