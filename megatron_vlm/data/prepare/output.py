"""Datasets made of finished shards: written beside their place and renamed; shards are hard links."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import MANIFEST_FILE, SUFFIXES, Manifest, load_manifest
from megatron_vlm.platform.files.durable import folder_beside


class _AlreadyThereError(Exception):
    """The output holds the same dataset already."""


@contextmanager
def dataset_beside(output: Path) -> Iterator[Path]:
    """Give a folder that is renamed to `output` when the block ends, unless `output` holds the same dataset already.

    Raises:
        ConfigError: the output folder holds something else, or another process writes it.
        StorageError: it cannot be written, or a shard cannot be linked into it.
    """
    try:
        with suppress(_AlreadyThereError), folder_beside(output) as unfinished:
            yield unfinished
            if output.is_dir() and any(output.iterdir()):
                _check_same(output, load_manifest(unfinished))
                raise _AlreadyThereError
    except OSError as error:
        raise StorageError(
            f"dataset cannot be written: {error.strerror or error}",
            where=str(error.filename2 or error.filename or output),
            fix="give an output folder on the file system of the input, where hard links are allowed",
        ) from error


def link_shard(shard: Path, link: Path) -> None:
    """Link the files of a shard; both paths are without suffix."""
    for suffix in SUFFIXES:
        os.link(f"{shard}.{suffix}", f"{link}.{suffix}")


def link_shards(shards: Sequence[Path], output: Path) -> None:
    """Link shards, given by their paths without suffix, into a folder under their numbers."""
    for number, shard in enumerate(shards):
        link_shard(shard, output / f"{number:05d}")


def _check_same(output: Path, manifest: Manifest) -> None:
    if not (output / MANIFEST_FILE).exists() or ShardedDataset.open(output).manifest != manifest:
        raise ConfigError("output folder holds something else", where=str(output), fix="give another, or delete it")
