"""What `generate` and `evaluate` have in common: the options that name a model, and how it is opened."""

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from megatron_vlm.cli.options import add_options, read_options
from megatron_vlm.config.inference import ModelOptions

if TYPE_CHECKING:
    from megatron_vlm.evaluation.opened_model import OpenedModel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model and how its prompts are written."""
    text = "a checkpoint, or a run folder for its newest checkpoint"
    parser.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help=text)
    add_options(parser, ModelOptions)


def open_from_options(
    args: argparse.Namespace, batch_positions: int | None = None
) -> "AbstractContextManager[OpenedModel]":
    """Open the model that the arguments name.

    Raises:
        ConfigError: the tokenizer does not belong to the model.
        CheckpointError: the checkpoint is missing or damaged.
    """
    from megatron_vlm.platform.device import prepare_process

    device = prepare_process()  # before anything that imports megatron-core
    from megatron_vlm.evaluation.opened_model import opened_model

    return opened_model(args.checkpoint, read_options(args, ModelOptions), device, batch_positions)
