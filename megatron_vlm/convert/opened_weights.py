"""The tensors of a whole model under our keys, from a checkpoint or from a Hugging Face folder, one at a time."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.checkpoint.lazy_tensors import LazyTensor
from megatron_vlm.checkpoint.run_settings import RunSettings, read_run_settings
from megatron_vlm.checkpoint.tensors import is_stacked, list_tensors
from megatron_vlm.checkpoint.verify import check_whole
from megatron_vlm.config import ModelConfig
from megatron_vlm.convert.adapter import adapter_shapes, read_merged
from megatron_vlm.convert.folder import CONFIG_NAME
from megatron_vlm.convert.foreign import explain
from megatron_vlm.convert.from_hf import open_model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedWeights:
    """A whole model on a disk."""

    path: Path
    """The folder, or the checkpoint."""
    model: ModelConfig
    tensors: Mapping[str, LazyTensor]
    """By our key."""
    settings: RunSettings | None
    """Of a checkpoint; None for a Hugging Face folder."""
    tokenizer: Path | None
    """Its model file; None for a folder without one."""


def open_weights(path: Path, tokenizer: str | None = None) -> OpenedWeights:
    """Open a checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder of a whole model.

    The adapter of a checkpoint is merged into its tensors.

    Args:
        path: the place.
        tokenizer: overrides that of a checkpoint.

    Raises:
        CheckpointError: it is none of these, or is damaged, or its tensors are not those of its settings.
    """
    if (path / CONFIG_NAME).is_file():
        model, tensors, found = open_model_folder(path)
        return OpenedWeights(path=path, model=model, tensors=tensors, settings=None, tokenizer=found)
    if error := explain(path, ours=False):
        raise error
    settings = read_run_settings(path, tokenizer=tokenizer)
    check_whole(settings.checkpoint)
    added = adapter_shapes(settings.model)
    tensors = {
        key: LazyTensor(
            shape=shape,
            dtype=dtype,
            is_stacked=is_stacked(key),
            make=functools.partial(_read, settings, key, dtype),
        )
        for key, (shape, dtype) in list_tensors(settings.checkpoint).items()
        if key not in added
    }
    return OpenedWeights(
        path=settings.checkpoint,
        model=settings.model,
        tensors=tensors,
        settings=settings,
        tokenizer=settings.tokenizer,
    )


def _read(settings: RunSettings, key: str, dtype: torch.dtype, layer: int | None) -> Tensor:
    return read_merged(settings.checkpoint, settings.model.adapter, key, layer).to(dtype)
