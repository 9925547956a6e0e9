"""The tensors of a whole model under our keys, from a checkpoint or from a Hugging Face folder, one at a time."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.checkpoint.lazy_tensors import LazyTensor
from megatron_vlm.checkpoint.run_settings import RunSettings, read_run_settings
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.checkpoint.verify import check_whole
from megatron_vlm.config import ModelConfig
from megatron_vlm.convert.folder import CONFIG_NAME
from megatron_vlm.convert.from_hf import open_model_folder

_LAYERS = ".layers."


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


def open_weights(path: Path) -> OpenedWeights:
    """Open a checkpoint, a run folder (its newest checkpoint) or a Hugging Face folder of a whole model.

    Raises:
        CheckpointError: it is none of these, or is damaged, or its tensors are not those of its settings.
    """
    if (path / CONFIG_NAME).is_file():
        model, tensors = open_model_folder(path)
        return OpenedWeights(path=path, model=model, tensors=tensors, settings=None)
    settings = read_run_settings(path)
    check_whole(settings.checkpoint)
    tensors = {
        key: LazyTensor(
            shape=shape,
            dtype=dtype,
            is_stacked=_LAYERS in key,
            make=functools.partial(read_tensor, settings.checkpoint, key),
        )
        for key, (shape, dtype) in list_tensors(settings.checkpoint).items()
    }
    return OpenedWeights(path=settings.checkpoint, model=settings.model, tensors=tensors, settings=settings)
