"""Prepare a raw corpus: any number of workers make a chunk of every input file, in any order; then these are joined.

The output has the same bytes for any number of workers and after any interruption. It is complete when it has a
manifest; until then the folder `.prepare` inside it keeps the finished chunks.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.join_index import save_join_index
from megatron_vlm.data.files.locations import Location, name_files, size_of
from megatron_vlm.data.prepare.array_task import PART_OPTION, ArrayTask
from megatron_vlm.data.prepare.chunk import ChunkJob, load_chunk, load_tokenizer_once, prepare_chunk
from megatron_vlm.data.prepare.joining import check_not_empty, join_facts
from megatron_vlm.data.shards.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    SUFFIXES,
    WORK_FOLDER,
    Manifest,
    load_manifest,
    manifest_from_tree,
    save_manifest,
    without_content,
)
from megatron_vlm.data.sources.image_store import index_tar
from megatron_vlm.data.tasks.processes import Engine, run_tasks
from megatron_vlm.platform.files.durable import UNFINISHED, discard, folder_once, storage_errors, write_durably
from megatron_vlm.platform.files.locks import locked

logger = logging.getLogger(__name__)

_JOB_FILE, _LOCK_FILE = "job.json", "lock"
_MAX_DIFFERENCES = 3
_CHUNKS, _IMAGE_INDEX = "chunks", "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareJob:
    """One dataset to prepare."""

    output: Path
    dataset_name: str
    """Name under which its loss is reported."""
    chunk: ChunkJob
    array_task: ArrayTask | None = None
    """Prepare only the input files of this task; the output is a dataset for `data merge`."""


def prepare(job: PrepareJob, *, num_workers: int = 1, engine: Engine | None = None) -> Manifest:
    """Prepare a dataset, or go on where an earlier call with the same options was interrupted.

    Args:
        job: what to prepare, and how.
        num_workers: processes; the result does not depend on their number.
        engine: runs the tasks in place of processes of this machine, e.g. `ray_engine.ray_cluster`.

    Returns:
        The manifest, as it is in the output folder.

    Raises:
        ConfigError: the output folder holds something else, or the preparation of something else; or the array has
            more tasks than there are input files.
        DataError: no document became a sample.
        StorageError: the disk is full or not writable, or a worker was killed.
    """
    inputs = name_files(job.chunk.source.inputs)
    bare = _bare_manifest(job, inputs)
    own = list(inputs.items()) if job.array_task is None else job.array_task.choose(list(inputs.items()))
    if (done := _finished_before(job.output, bare)) is not None:
        logger.info("%s is already prepared with these options", job.output)
        return done
    run: Engine = engine or functools.partial(run_tasks, num_workers=num_workers)
    work = job.output / WORK_FOLDER
    with _claimed(work, bare):
        # Another process may have finished between the first look and the claim.
        if (done := _finished_before(job.output, bare)) is not None:
            return done
        chunk = _build_index(job.chunk, work, run)
        folders = [work / _CHUNKS / f"{number:05d}" for number in range(len(own))]
        # Each task names its own input file; a list of thousands in every task would be most of the traffic.
        small = dataclasses.replace(chunk, source=dataclasses.replace(chunk.source, inputs=()))  # type: ignore[type-var]
        tasks = [(small, path, name, folder) for (name, path), folder in zip(own, folders, strict=True)]
        run(prepare_chunk, tasks, unit="documents", reports=True)
        manifest = _join(job, bare, folders)
        save_manifest(manifest, job.output)
        shutil.rmtree(work, ignore_errors=True)  # another process may just be trying to claim it
    return manifest


def _bare_manifest(job: PrepareJob, inputs: dict[str, Location]) -> Manifest:
    """Return the manifest as far as it is known before any data is read: the dataset, its inputs and the options."""
    chunk = job.chunk
    rules: Any = getattr(chunk.source, "rules", None)
    options = {
        "format": type(chunk.source).__name__,
        "rules": dataclasses.asdict(rules),
        "recipe": dataclasses.asdict(chunk.recipe),
        "images": dataclasses.asdict(chunk.image_rules),
        "max_shard_bytes": chunk.max_shard_bytes,
        "inputs": {name: size_of(path) for name, path in inputs.items()},
    }
    if chunk.images.tars:
        options["image_tars"] = {name: size_of(path) for name, path in name_files(chunk.images.tars).items()}
    if job.array_task is not None:
        options[PART_OPTION] = {"index": job.array_task.index, "count": job.array_task.count}
    return Manifest(
        dataset_name=job.dataset_name,
        tokenizer=load_tokenizer_once(chunk.tokenizer).facts,
        shards=(),
        documents=0,
        options=json.loads(json.dumps(options)),
    )


def _finished_before(output: Path, bare: Manifest) -> Manifest | None:
    """Return the manifest of an earlier, complete preparation; ConfigError if the folder holds anything else."""
    if (output / MANIFEST_FILE).exists():
        found = load_manifest(output)
        if (there := without_content(found)) != bare:
            raise ConfigError(
                f"output folder holds a dataset that differs in {_difference(there, bare)}",
                where=str(output),
                fix="give another --output, or delete the folder",
            )
        shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)  # left by a kill between the manifest and the end
        return found
    if output.exists() and not (output / WORK_FOLDER).exists() and any(output.iterdir()):
        raise ConfigError("output folder is not empty", where=str(output), fix="give another --output")
    return None


def _difference(found: Manifest, wanted: Manifest) -> str:
    if found.dataset_name != wanted.dataset_name:
        return f"dataset name: {found.dataset_name}"
    if found.tokenizer != wanted.tokenizer:
        return f"tokenizer: {found.tokenizer.name} of sha256 {found.tokenizer.sha256[:12]}"
    there, here = _flatten(found.options), _flatten(wanted.options)
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not names:
        return "the order of its inputs"
    shown = [f"{name} {there.get(name)}, now {here.get(name)}" for name in names[:_MAX_DIFFERENCES]]
    return "options: " + "; ".join(shown) + ("; ..." if len(names) > _MAX_DIFFERENCES else "")


def _difference_of(content: str, wanted: Manifest) -> str:
    try:
        return _difference(manifest_from_tree(json.loads(content)), wanted)
    except (ValueError, KeyError, TypeError):  # of another version of this program
        return "options or inputs"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested options under their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@contextmanager
def _claimed(work: Path, bare: Manifest) -> Iterator[None]:
    """Lock the work folder, and make sure that it belongs to this preparation."""
    with ExitStack() as held:
        with storage_errors("output folder cannot be written", work.parent):
            (work / _CHUNKS).mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(locked(work / _LOCK_FILE))
        if lock is None:
            what = "another process is preparing this folder"
            raise ConfigError(what, where=str(work.parent), fix="wait for it, or stop it")
        content = json.dumps(dataclasses.asdict(bare))
        if not (work / _JOB_FILE).exists():
            write_durably(work / _JOB_FILE, content.encode())
        elif (found := (work / _JOB_FILE).read_text()) != content:
            raise ConfigError(
                f"output folder holds an unfinished preparation that differs in {_difference_of(found, bare)}",
                where=str(work.parent),
                fix="use the same options to go on, or delete the folder",
            )
        for left_over in [path for folder in (work, work / _CHUNKS) for path in folder.glob(f"*{UNFINISHED}")]:
            discard(left_over)
        yield


def _build_index(chunk: ChunkJob, work: Path, run: Engine) -> ChunkJob:
    """Index the tars in which images are found by name; return the job with the place of the index."""
    if not chunk.images.tars:
        return chunk
    folder = work / _IMAGE_INDEX
    if not folder.exists():
        rows = run(index_tar, [(p, n) for n, p in enumerate(chunk.images.tars)], unit="files")
        with folder_once(folder) as unfinished:
            save_join_index(rows, unfinished)
    return dataclasses.replace(chunk, images=dataclasses.replace(chunk.images, index=folder))


def _join(job: PrepareJob, bare: Manifest, folders: list[Path]) -> Manifest:
    """Join the chunks and return the complete manifest; calling this again after an interruption is harmless."""
    chunks = [load_chunk(folder) for folder in folders]
    shards = [folder / shard.name for folder, chunk in zip(folders, chunks, strict=True) for shard in chunk.shards]
    manifest = join_facts(bare, chunks, folders, job.output / REJECTS_FILE)
    if job.array_task is None:
        check_not_empty(manifest, job.output / REJECTS_FILE)
    for source, shard in zip(shards, manifest.shards, strict=True):
        for suffix in SUFFIXES:
            with suppress(FileNotFoundError):  # an interrupted call may have moved it already
                os.replace(f"{source}.{suffix}", job.output / f"{shard.name}.{suffix}")
    return manifest
