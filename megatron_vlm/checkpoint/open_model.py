"""Open a checkpoint of any parallel layout as a whole model in this process, to generate or to compare."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from megatron_vlm.checkpoint.load import load_weights
from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.config import (
    BlendEntry,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_vlm.models.build import build_model
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import build_groups, seed_everything, single_process

Precision = Literal["fp32", "bf16"]


@contextmanager
def open_model(settings: RunSettings, precision: Precision = "fp32") -> Iterator[VisionLanguageModel]:
    """Load the weights, verified, into one model without gradients.

    Starts a job of one rank and ends it afterwards; a job of one rank that runs already is used as it is.

    Args:
        settings: the checkpoint, from `read_run_settings`.
        precision: in which the model computes.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: this process is a rank of a larger job.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("open_model needs a process of its own")
    with single_process():
        build_groups(ParallelConfig())
        seed_everything(0)
        chunks = build_model(_as_run(settings, precision))
        load_weights(str(settings.checkpoint), chunks)
        model = chunks[0].eval()
        model.requires_grad_(False)
        yield model


def _as_run(settings: RunSettings, precision: Precision) -> TrainConfig:
    """Return the run that a model is built from: one rank, nothing to learn."""
    return TrainConfig(
        stage="sft",
        run_dir=str(settings.checkpoint.parent.parent),
        model=settings.model,
        data=DataConfig(
            tokenizer=str(settings.tokenizer),
            blend=(BlendEntry(path="none"),),
            seq_length=settings.model.language.max_position_embeddings,
            image_aspect=settings.image_aspect,
        ),
        optimizer=OptimizerConfig(lr=0.0),
        training=TrainingConfig(global_batch_size=1, train_iters=1, precision=precision),
    )
