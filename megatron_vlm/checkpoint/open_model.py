"""Open a checkpoint of any parallel layout as a whole model in this process, for generation or comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from megatron_vlm.checkpoint.load import load_weights
from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import build_groups, seed_everything, single_process

Precision = Literal["fp32", "bf16"]


@contextmanager
def open_model(settings: RunSettings, precision: Precision = "fp32") -> Iterator[VisionLanguageModel]:
    """Verify the weights and load them into one model without gradients.

    Starts a job of one rank and ends it afterwards, unless one is running already.

    Args:
        settings: the checkpoint, from `read_run_settings`.
        precision: precision of the weights and computations.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: this process is a rank of a larger job.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("open_model needs a process of its own")
    with single_process():
        parallel = ParallelConfig()
        build_groups(parallel)
        seed_everything(0)
        chunks = build_model(settings.model, parallel, Computation(precision=precision))
        load_weights(str(settings.checkpoint), chunks)
        model = chunks[0].eval()
        model.requires_grad_(False)
        yield model
