"""Prepare a raw corpus: every input file becomes a part, in any order, by any number of workers; then they are joined.

The output is the same bytes for any number of workers, and after any interruption. It is complete when it has a
manifest; until then a folder `.prepare` inside of it keeps what is done.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.join_index import JoinRows, save_join_index
from megatron_vlm.data.files.locations import Location, name_files, size_of
from megatron_vlm.data.prepare.joining import check_not_empty, join_facts
from megatron_vlm.data.prepare.part import (
    PartJob,
    discard,
    load_part,
    prepare_part,
)
from megatron_vlm.data.prepare.share import SHARE_OPTION, Share
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
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.platform.files.durable import storage_errors, write_durably
from megatron_vlm.platform.files.locks import locked

logger = logging.getLogger(__name__)

_JOB_FILE, _LOCK_FILE = "job.json", "lock"
_MAX_DIFFERENCES = 3
_PARTS, _IMAGE_INDEX = "parts", "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareJob:
    """One dataset to prepare."""

    output: Path
    source_name: str
    """Name under which its loss is reported."""
    part: PartJob
    share: Share | None = None
    """Prepare only this share of the input files; the output is a dataset for `data merge`."""


def prepare(job: PrepareJob, *, num_workers: int = 1, engine: Engine | None = None) -> Manifest:
    """Prepare a dataset, or go on where an earlier call with the same options was interrupted.

    Args:
        job: what to prepare, and how.
        num_workers: processes; the result does not depend on it.
        engine: runs the tasks instead of processes of this machine, e.g. `ray_engine.ray_cluster`; nor on this.

    Returns:
        The manifest, which is also in the output folder.

    Raises:
        ConfigError: the output folder holds something else, or the preparation of something else; or there are more
            shares than input files.
        DataError: no document became a sample.
        StorageError: the disk is full or not writable, or a worker was killed.
    """
    inputs = name_files(job.part.source.inputs)
    plan = _plan(job, inputs)
    own = list(inputs.items()) if job.share is None else job.share.choose(list(inputs.items()))
    done = _finished_before(job.output, plan)
    if done is not None:
        logger.info("%s is already prepared with these options", job.output)
        return done
    run: Engine = engine or functools.partial(run_tasks, num_workers=num_workers)
    work = job.output / WORK_FOLDER
    with _claimed(work, plan):
        # Another process may have finished between the first look and the claim.
        if (done := _finished_before(job.output, plan)) is not None:
            return done
        part = _build_index(job.part, work, run)
        folders = [work / _PARTS / f"{number:05d}" for number in range(len(own))]
        # Workers get their input file by itself; a list of thousands with every task would be most of the traffic.
        small = dataclasses.replace(part, source=dataclasses.replace(part.source, inputs=()))  # type: ignore[type-var]
        tasks = [(small, path, name, folder) for (name, path), folder in zip(own, folders, strict=True)]
        run(prepare_part, tasks, unit="documents", reports=True)
        manifest = _join(job, plan, folders)
        save_manifest(manifest, job.output)
        shutil.rmtree(work, ignore_errors=True)  # another process may just be looking whether it is free
    return manifest


def _plan(job: PrepareJob, inputs: dict[str, Location]) -> Manifest:
    """Return the manifest as far as it is known before any data is read: what is prepared, from what and how."""
    part = job.part
    rules: Any = getattr(part.source, "rules", None)
    options = {
        "format": type(part.source).__name__,
        "rules": dataclasses.asdict(rules),
        "recipe": dataclasses.asdict(part.recipe),
        "images": dataclasses.asdict(part.image_rules),
        "max_shard_bytes": part.max_shard_bytes,
        "inputs": {name: size_of(path) for name, path in inputs.items()},
    }
    if part.images.tars:
        options["image_tars"] = {name: size_of(path) for name, path in name_files(part.images.tars).items()}
    if job.share is not None:
        options[SHARE_OPTION] = {"index": job.share.index, "count": job.share.count}
    return Manifest(
        dataset_name=job.source_name,
        tokenizer=load_tokenizer(part.tokenizer).facts,
        shards=(),
        documents=0,
        options=json.loads(json.dumps(options)),
    )


def _finished_before(output: Path, plan: Manifest) -> Manifest | None:
    """Return the manifest of an earlier, complete preparation.

    Raises:
        ConfigError: the folder holds another dataset, or other files.
    """
    if (output / MANIFEST_FILE).exists():
        found = load_manifest(output)
        bare = without_content(found)
        if bare != plan:
            raise ConfigError(
                f"output folder holds a dataset that differs in {_difference(bare, plan)}",
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
def _claimed(work: Path, plan: Manifest) -> Iterator[None]:
    """Hold the work folder against other processes, and against other options.

    Raises:
        ConfigError: it is in use, or holds the unfinished preparation of something else.
        StorageError: it cannot be written.
    """
    with ExitStack() as held:
        with storage_errors("output folder cannot be written", work.parent):
            (work / _PARTS).mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(locked(work / _LOCK_FILE))
        if lock is None:
            raise ConfigError(
                "another process is preparing this folder", where=str(work.parent), fix="wait for it, or stop it"
            )
        content = json.dumps(dataclasses.asdict(plan))
        if not (work / _JOB_FILE).exists():
            write_durably(work / _JOB_FILE, content.encode())
        elif (found := (work / _JOB_FILE).read_text()) != content:
            raise ConfigError(
                f"output folder holds an unfinished preparation that differs in {_difference_of(found, plan)}",
                where=str(work.parent),
                fix="use the same options to go on, or delete the folder",
            )
        for left_over in [path for folder in (work, work / _PARTS) for path in folder.glob("*.tmp")]:
            discard(left_over)
        yield


def _build_index(part: PartJob, work: Path, run: Engine) -> PartJob:
    """Index the tars in which images are found by name, and tell the job where the index is."""
    if not part.images.tars:
        return part
    folder = work / _IMAGE_INDEX
    if not folder.exists():
        rows: list[JoinRows] = run(index_tar, [(p, n) for n, p in enumerate(part.images.tars)], unit="files")
        unfinished = folder.with_name(folder.name + ".tmp")
        save_join_index(rows, unfinished)
        unfinished.rename(folder)
    return dataclasses.replace(part, images=dataclasses.replace(part.images, index=folder))


def _join(job: PrepareJob, plan: Manifest, folders: list[Path]) -> Manifest:
    """Put the parts together and return the complete manifest; may be done again after an interruption.

    Raises:
        DataError: no document became a sample, of all input files.
    """
    parts = [load_part(folder) for folder in folders]
    shards = [folder / shard.name for folder, part in zip(folders, parts, strict=True) for shard in part.shards]
    manifest = join_facts(plan, parts, folders, job.output / REJECTS_FILE)
    if job.share is None:
        check_not_empty(manifest, job.output / REJECTS_FILE)
    _move_shards(job.output, shards, manifest)
    return manifest


def _move_shards(output: Path, sources: Sequence[Path], manifest: Manifest) -> None:
    """Rename the shards of all parts into the output folder."""
    for source, shard in zip(sources, manifest.shards, strict=True):
        for suffix in SUFFIXES:
            found = source.with_name(f"{source.name}.{suffix}")
            if found.exists():  # not moved before an interruption
                os.replace(found, output / f"{shard.name}.{suffix}")
