"""What `generate` and `evaluate` have in common: the options that name a model, and how it is opened."""

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, get_args

from megatron_vlm.config.prepare import ConversationRules, TemplateName

if TYPE_CHECKING:
    from megatron_vlm.evaluation.opened_model import OpenedModel


def add_model_options(parser: argparse.ArgumentParser, *, bare_template: bool) -> None:
    """Add the arguments that name a model and how its prompts are written.

    Args:
        parser: of the verb.
        bare_template: whether the template may be none, so that the model continues bare text.
    """
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT_OR_RUN", help="a checkpoint, or a run folder for its newest checkpoint"
    )
    none = "; none: continue the prompt as bare text" if bare_template else ""
    parser.add_argument(
        "--template",
        choices=(*get_args(TemplateName), *(["none"] if bare_template else [])),
        default=ConversationRules().template,
        help=f"conversation template used in training{none} (default: %(default)s)",
    )
    parser.add_argument(
        "--system",
        default="default",
        metavar="TEXT",
        help="system prompt: default (the template's own), none, or a text (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model (default: the run's own)")
    parser.add_argument(
        "--image-aspect",
        choices=("pad", "square", "resize"),
        help="how an image becomes a square (default: as in the run)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(default: bf16 on a GPU, else fp32)")


def open_from_options(
    args: argparse.Namespace, batch_positions: int | None = None
) -> "AbstractContextManager[OpenedModel]":
    """Open the model that the arguments name.

    Raises:
        ConfigError: the tokenizer does not belong to the model, or the template is unknown.
        CheckpointError: the checkpoint is missing or damaged.
    """
    from megatron_vlm.platform.device import prepare_process

    device = prepare_process()  # before anything that imports megatron-core
    from megatron_vlm.evaluation.opened_model import ModelOptions, opened_model

    options = ModelOptions(
        checkpoint=args.checkpoint,
        template=args.template,
        system=args.system,
        tokenizer=args.tokenizer,
        image_aspect=args.image_aspect,
        precision=args.precision,
        batch_positions=batch_positions,
    )
    return opened_model(options, device)
