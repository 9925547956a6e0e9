"""What `generate` and `evaluate` have in common: options, and the opened model with its prompt format."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vlm.config import ConfigError

if TYPE_CHECKING:
    from megatron_vlm.evaluation.answer import Generator
    from megatron_vlm.evaluation.pictures import PictureReader
    from megatron_vlm.evaluation.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that answers, and what its prompts are made with."""

    generator: "Generator"
    prompt_format: "PromptFormat"
    reader: "PictureReader"
    checkpoint: str


def add_model_options(parser: argparse.ArgumentParser, *, bare_template: bool) -> None:
    """Add the arguments that name a model and how it is asked."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help="a run's newest checkpoint, or this one")
    none = "; none: the bare text, to be continued" if bare_template else ""
    parser.add_argument(
        "--template", default="vicuna_v1", help=f"conversation template of the training (%(default)s){none}"
    )
    parser.add_argument(
        "--system", default="default", metavar="TEXT", help="system prompt: default (the template's), none, or a text"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model; default: that of the run")
    parser.add_argument("--image-aspect", choices=("pad", "square", "resize"), help="default: that of the run")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")


@contextlib.contextmanager
def opened_model(args: argparse.Namespace, batch_positions: int | None = None) -> Iterator[OpenedModel]:
    """Open the model that the arguments name.

    Raises:
        ConfigError: the tokenizer is not that of the model, or the template is unknown.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from megatron_vlm.platform.device import prepare_process

    device = prepare_process()
    from megatron_vlm.checkpoint.open_model import Precision, open_model
    from megatron_vlm.checkpoint.run_settings import read_run_settings
    from megatron_vlm.data.text.templates import DEFAULT_SYSTEM, find_template
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.evaluation.answer import POSITIONS_PER_BATCH, Generator
    from megatron_vlm.evaluation.pictures import PictureReader
    from megatron_vlm.evaluation.prompts import PromptFormat

    settings = read_run_settings(args.checkpoint, tokenizer=args.tokenizer, image_aspect=args.image_aspect)
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.vocab_size != settings.model.language.vocab_size:
        raise ConfigError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model {settings.model.language.vocab_size}",
            where=str(settings.tokenizer),
            fix="give the tokenizer of the training with --tokenizer",
        )
    prompt_format = PromptFormat(
        tokenizer=tokenizer,
        model=settings.model,
        template=None if args.template == "none" else find_template(args.template),
        system={"default": DEFAULT_SYSTEM, "none": None}.get(args.system, args.system),
    )
    precision: Precision = args.precision or ("fp32" if device.type == "cpu" else "bf16")
    with open_model(settings, precision) as model:
        yield OpenedModel(
            generator=Generator(
                model,
                settings.model,
                eos_id=tokenizer.eos_id,
                positions_per_batch=batch_positions or POSITIONS_PER_BATCH,
            ),
            prompt_format=prompt_format,
            reader=PictureReader(settings.model.vision, settings.image_aspect),
            checkpoint=str(settings.checkpoint),
        )
