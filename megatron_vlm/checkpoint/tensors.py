"""Whole tensors of a checkpoint, one at a time and without a model: for conversion and comparison."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_vlm.checkpoint.base import record_base, with_bases
from megatron_vlm.checkpoint.folder import checkpoint_path, write_latest
from megatron_vlm.checkpoint.lazy_tensors import LazyTensor, save_lazily
from megatron_vlm.checkpoint.manifest import Manifest, checksum_file, list_files, write_manifest
from megatron_vlm.checkpoint.parallel_files import STATE_PREFIX
from megatron_vlm.checkpoint.sharded_state import MODEL_PREFIX
from megatron_vlm.checkpoint.stored_values import list_stored, read_stored
from megatron_vlm.config import StorageError
from megatron_vlm.parallel.groups import single_process
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, folder_beside, storage_errors
from megatron_vlm.platform.files.run_folder import CONFIG_NAME

_LAYERS = ".layers."
_FIX = "make room or name another folder"
_TORCH_WRITER = re.compile("iostream|inline_container|PytorchStreamWriter")
"""In errors of torch.save on a full disk, which name neither errno nor file."""


def is_stacked(key: str) -> bool:
    """Tell whether a tensor stacks the layers of a part along its first axis."""
    return _LAYERS in key and not key.startswith(STATE_PREFIX)


def list_tensors(checkpoint: Path, *, with_optimizer: bool = False) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every model tensor by key; layers are stacked along the first axis.

    Of a checkpoint that holds only what learns, these are its tensors and those of its base.

    Args:
        checkpoint: its folder.
        with_optimizer: include the optimizer's state, which each layer has for itself.

    Raises:
        CheckpointError: an index is damaged; the base is missing or another one.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    prefixes = (MODEL_PREFIX, STATE_PREFIX) if with_optimizer else (MODEL_PREFIX,)
    for folder in reversed(with_bases(checkpoint)):
        found |= {key: (stored.shape, stored.dtype) for key, stored in list_stored(folder).items()}
    return {key: found[key] for key in sorted(found) if key.startswith(prefixes)}


def keys_beside_base(checkpoint: Path) -> set[str]:
    """Return the keys of the model tensors that do not come from the last of a checkpoint's bases: what was learned.

    Raises:
        CheckpointError: as for `list_tensors`.
    """
    folders = with_bases(checkpoint)[:-1]
    return {key for folder in folders for key in list_stored(folder) if key.startswith(MODEL_PREFIX)}


def read_tensor(checkpoint: Path, key: str, layer: int | None = None) -> Tensor:
    """Read one whole tensor of a checkpoint saved at any layout.

    Args:
        checkpoint: its folder; what it lacks is read from its base.
        key: as `list_tensors` names it.
        layer: read only this layer of a tensor that stacks layers; the result has no layer axis.
    """
    found = (list_stored(folder) for folder in with_bases(checkpoint))
    return read_stored(next(stored for stored in found if key in stored)[key], layer)


def hash_weights(checkpoint: Path) -> str:
    """Return a sha256 over names, shapes and values of all weights: independent of the parallel layout."""
    digest = hashlib.sha256()
    for key, (shape, dtype) in list_tensors(checkpoint).items():
        digest.update(f"{key} {shape} {dtype}\n".encode())
        digest.update(read_tensor(checkpoint, key).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_weights(
    run_dir: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    config: Mapping[str, object],
    report: Callable[[], object] = lambda: None,
    base: Path | None = None,
) -> Path:
    """Write whole tensors as checkpoint 0 of a new run folder; it can be loaded at any layout.

    Args:
        run_dir: created if it does not exist.
        tensors: by key, as `list_tensors` names them; lazy ones are made one at a time.
        config: content of `config.yaml`; at least the `model` section.
        report: called after each tensor; for a tensor that stacks layers, after each layer.
        base: checkpoint that holds the other tensors of the model; None: `tensors` are all.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a tensor does not have the announced shape or type, or a file reads back differently.
        ConfigError: another process writes this checkpoint.
        StorageError: the disk is full or read-only.
    """
    path = checkpoint_path(run_dir, 0)
    text = yaml.safe_dump(dict(config), sort_keys=False)
    lazy = {key: value if isinstance(value, LazyTensor) else _as_lazy(key, value) for key, value in tensors.items()}
    with _storage(path), folder_beside(path, replaces=True) as unfinished:
        with single_process():
            written = save_lazily(lazy, unfinished, report)
        (unfinished / CONFIG_NAME).write_text(text)
        (Path(run_dir) / CONFIG_NAME).write_text(text)
        files = {name: written.get(name) or checksum_file(unfinished / name) for name in list_files(unfinished)}
        record = None if base is None else record_base(base, run_dir)
        write_manifest(unfinished, Manifest(iteration=0, progress={}, files=files, base=record))
    write_latest(run_dir, 0)
    return path


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Say in one line that a disk is full or fails."""
    try:
        with storage_errors("checkpoint not written", path, only=STORAGE_ERRNOS, fix=_FIX):
            yield
    except RuntimeError as error:
        if not _TORCH_WRITER.search(str(error)):
            raise
        raise StorageError(f"checkpoint not written: {str(error).splitlines()[0]}", where=str(path), fix=_FIX) from None


def _as_lazy(key: str, tensor: Tensor) -> LazyTensor:
    return LazyTensor(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        is_stacked=is_stacked(key),
        make=lambda layer: tensor if layer is None else tensor[layer],
    )
