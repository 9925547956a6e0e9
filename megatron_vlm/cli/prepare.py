"""`megatron-vlm prepare KIND`: raw corpus to shards.

A kind is a module of `config/sources`, whose options become flags, and a module or folder of the same name in
`data/sources`, whose `find_source` reads the corpus.
"""

import argparse
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.options import add_command, add_options, read_options
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.config import ConfigError, ExitCode, UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.prepare import ImageOptions, ImageRules, KindOptions, PrepareOptions
from megatron_vlm.data.files.locations import (
    Location,
    RemoteFile,
    check_suffixes,
    folder_of,
    list_location,
    names_files,
    parse_location,
)
from megatron_vlm.platform.machine import count_cores

if TYPE_CHECKING:
    from megatron_vlm.data.prepare.chunk import ImagePlace
    from megatron_vlm.data.prepare.run import PrepareJob
    from megatron_vlm.data.shards.manifest import Manifest

_KINDS, _SOURCES = "megatron_vlm.config.sources", "megatron_vlm.data.sources"
_NOTES = "T stands for a SentencePiece model."


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    kinds = {name: find_module(_KINDS, name, "kind") for name in module_names(_KINDS)}
    examples = {name: f"prepare {name} {kind.EXAMPLE}" for name, kind in kinds.items()}
    text = "turn a raw corpus into shards; parallel, resumable, with a list of every reject"
    parser = add_command(subparsers, "prepare", text, *examples.values(), notes=_NOTES)
    parsers = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, kind in kinds.items():
        own = add_command(parsers, name, kind.HELP, examples[name], notes=f"{kind.NOTES}\n{_NOTES}".lstrip())
        add_options(own, PrepareOptions)
        add_options(own, kind.Options())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    with stops_at_once("finished input files are kept"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.array_task import ArrayTask
    from megatron_vlm.data.prepare.chunk import ChunkJob, load_tokenizer_once
    from megatron_vlm.data.prepare.run import PrepareJob, prepare

    common = read_options(args, PrepareOptions)
    options: KindOptions = read_options(args, find_module(_KINDS, args.kind, "kind").Options())
    if not options.dataset_name.strip():
        raise UsageError("--source is empty", fix="name the dataset, or leave --source out")
    tokenizer = load_tokenizer_once(common.tokenizer)
    inputs = tuple(map(parse_location, common.input))
    chunk = ChunkJob(
        source=importlib.import_module(f"{_SOURCES}.{args.kind}").find_source(inputs, options, tokenizer),
        recipe=options.recipe,
        tokenizer=common.tokenizer,
        images=_image_place(options.images, inputs[0]),
        image_rules=options.images.rules if options.images else ImageRules(),
        max_shard_bytes=common.max_shard_bytes,
    )
    task = ArrayTask.parse(common.part) if common.part is not None else None
    output = common.output if task is None else task.folder(common.output)
    job = PrepareJob(output=output, dataset_name=options.dataset_name, chunk=chunk, array_task=task)
    num_workers = common.workers or count_cores()
    if common.distributor == "ray":
        manifest = _prepare_on_ray(job, common.ray_address or os.environ.get("RAY_ADDRESS"), num_workers)
    else:
        manifest = prepare(job, num_workers=num_workers)
    _report(output, manifest)
    return ExitCode.DONE


def _prepare_on_ray(job: "PrepareJob", address: str | None, num_workers: int) -> "Manifest":
    from megatron_vlm.data.prepare.run import prepare
    from megatron_vlm.data.tasks.ray_engine import ray_cluster

    # Unless told not to, Ray reports usage to its makers and prints a warning about future GPU settings.
    for variable in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(variable, "0")
    with ray_cluster(address, num_workers=num_workers) as engine:
        return prepare(job, engine=engine)


def _image_place(options: ImageOptions | None, first_input: Location) -> "ImagePlace":
    from megatron_vlm.data.prepare.chunk import ImagePlace

    if options is None:
        return ImagePlace()
    images = parse_location(options.images) if options.images is not None else None
    if images is None:
        folder = folder_of(first_input)
    elif names_files(images):
        tars = list_location(images, (".tar",), "--images")
        check_suffixes(tars, (".tar",), "--images")
        return ImagePlace(tars=tuple(tars))
    else:
        folder = images
    # A bucket may let the user read files but not list them; then nobody can tell whether the folder exists.
    is_given = images is not None or not isinstance(folder, RemoteFile)
    if is_given and not folder.is_dir():
        raise ConfigError("image folder does not exist", where=str(folder), fix="check --images")
    tars = (
        list_location(folder, (".tar",), "--images")
        if images is not None and not (isinstance(folder, RemoteFile) and folder.is_web)
        else []
    )
    return ImagePlace(folder=folder, tars=tuple(tars))


def _report(output: Path, manifest: "Manifest") -> None:
    from megatron_vlm.data.rejects import describe_rejects

    counts, used = manifest.counts, manifest.documents - manifest.rejected
    reasons = f" ({describe_rejects(manifest.rejects)})" if manifest.rejects else ""
    print(f"documents {manifest.documents} = used {used} + rejected {manifest.rejected}{reasons}")
    print(
        f"samples {counts.samples}, images {counts.images} ({counts.image_bytes / 1e6:.1f} MB), "
        f"text tokens {counts.text_tokens} of which {counts.trained_tokens} are trained, shards {len(manifest.shards)}"
    )
    for note, count in manifest.notes.items():
        print(f"{note.replace('_', ' ')} {count}")
    print(f"wrote {output}")
