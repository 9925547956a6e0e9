"""`megatron-vlm data ACTION`: what is done with finished shards."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from megatron_vlm.cli.options import add_command, add_workers
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.cli.values import local_path, new_file, new_folder, new_name, positive, seed, whole_number
from megatron_vlm.config import DataError, ExitCode, UsageError


class _Action(NamedTuple):
    """One action on shards."""

    text: str
    example: str
    """One whole command a line."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    kept: str = ""
    """What an interrupted action keeps for the next start of the same command."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    text = "check, describe, show, export, join, split and deduplicate prepared shards"
    parser = add_command(
        subparsers, "data", text, *(line for action in _ACTIONS.values() for line in action.example.splitlines())
    )
    parsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, action in _ACTIONS.items():
        action.add_options(add_command(parsers, name, action.text, *action.example.splitlines()))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    action = _ACTIONS[args.action]
    with stops_at_once(action.kept):
        return action.run(args)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=local_path, metavar="DIR", help="folder of shards")


def _add_tokenizer(parser: argparse.ArgumentParser, *, required: bool = True, more: str = "") -> None:
    text = f"tokenizer that the shards were prepared with: tokenizer.model, tokenizer.json, or a folder{more}"
    parser.add_argument("--tokenizer", type=local_path, required=required, metavar="T", help=text)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument("--decode", action="store_true", help="also decode every image")


def _verify(args: argparse.Namespace) -> int:
    from megatron_vlm.data.shards.manifest import load_manifest
    from megatron_vlm.data.shards.verify import verify_dataset

    faults = 0
    for fault in verify_dataset(args.folder, decode=args.decode):
        faults += 1
        print(fault, flush=True)
    if faults:
        raise DataError(
            f"dataset is damaged; faults listed above: {faults}",
            where=str(args.folder),
            fix="prepare the dataset again, or copy it again from where it is whole",
        )
    manifest = load_manifest(args.folder)
    counts = manifest.counts
    print(
        f"{args.folder}: whole; {manifest.documents} documents = {manifest.documents - manifest.rejected} used + "
        f"{manifest.rejected} rejected; {counts.samples} samples, {counts.images} images, "
        f"{counts.text_tokens} text tokens"
    )
    return ExitCode.DONE


def _add_stats(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--histograms", type=new_folder, metavar="DIR", help="also draw histograms into this folder")


def _stats(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from megatron_vlm.data.shards.dataset import ShardedDataset
    from megatron_vlm.data.shards.statistics import compute_statistics, format_statistics, save_histograms

    statistics = compute_statistics(ShardedDataset.open(args.folder))
    print(json.dumps(dataclasses.asdict(statistics), indent=1) if args.json else format_statistics(statistics))
    if args.histograms:
        for path in save_histograms(statistics, args.histograms):
            if not args.json:
                print(f"wrote {path}")
    return ExitCode.DONE


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=local_path, metavar="DIR", help="folder of shards; with --iteration, of a run")
    _add_tokenizer(parser, required=False, more=" (default with --iteration: the run's)")
    add = parser.add_argument
    add("--output", type=new_file, metavar="FILE", help="HTML page to write; needed unless --iteration is given")
    add("--samples", type=whole_number(0), nargs="+", default=[], metavar="I", help="show these samples")
    add("--number", type=positive, default=20, metavar="N", help="or this many samples (default: %(default)s)")
    add("--seed", type=seed, metavar="S", help="choose them at random (default: the first ones)")
    batch = parser.add_argument_group("a global batch of a run")
    add = batch.add_argument
    add("--iteration", type=positive, metavar="N", help="list the samples of iteration N, counted from 1, by the plan")
    add("--text", action="store_true", help="also print their text")
    add("--pictures", type=new_folder, metavar="OUT", help="also write their images, as the shards hold them, to OUT")


def _inspect(args: argparse.Namespace) -> int:
    if args.iteration is not None:
        from megatron_vlm.platform.device import quieten

        quieten()  # before anything that imports megatron-core
        from megatron_vlm.training.batch_listing import list_batch

        for line in list_batch(
            args.folder,
            args.iteration,
            tokenizer=args.tokenizer,
            with_text=args.text,
            pictures=args.pictures,
            page=args.output,
        ):
            print(line)
        return ExitCode.DONE
    if args.text or args.pictures:
        raise UsageError("--text and --pictures show a global batch of a run", fix="give --iteration, too")
    for flag in ("tokenizer", "output"):
        if getattr(args, flag) is None:
            raise UsageError(f"--{flag} is missing", fix="give it, or --iteration with the folder of a run")
    from megatron_vlm.data.shards.dataset import ShardedDataset
    from megatron_vlm.data.shards.page import choose_samples, render_page
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.platform.files.durable import write_durably

    dataset = ShardedDataset.open(args.folder)
    indices = choose_samples(len(dataset), number=args.number, seed=args.seed, indices=args.samples)
    page = render_page(dataset, load_tokenizer(args.tokenizer), indices)
    write_durably(args.output, page.encode())
    print(f"wrote {len(indices)} samples to {args.output}")
    return ExitCode.DONE


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    _add_tokenizer(parser)
    add = parser.add_argument
    text = "tars with KEY.json, KEY.0.jpg, KEY.1.png, ... (default: %(default)s)"
    add("--format", choices=("webdataset",), default="webdataset", help=text)
    text = "folder for the tars; new, or unfinished to continue it"
    add("--output", type=new_folder, required=True, metavar="OUT", help=text)
    text = "samples per tar (default: %(default)s)"
    add("--samples-per-shard", type=positive, default=10_000, metavar="N", help=text)
    add_workers(parser)


def _export(args: argparse.Namespace) -> int:
    from megatron_vlm.data.shards.export import ExportJob, export_webdataset
    from megatron_vlm.data.shards.manifest import load_manifest

    job = ExportJob(
        folder=args.folder,
        output=args.output,
        tokenizer=args.tokenizer,
        samples_per_shard=args.samples_per_shard,
    )
    tars, counts = export_webdataset(job, num_workers=args.workers), load_manifest(args.folder).counts
    print(f"wrote {args.output}: samples {counts.samples}, images {counts.images}, tars {tars}")
    return ExitCode.DONE


def _add_merge(parser: argparse.ArgumentParser) -> None:
    text = "new folder, on the same file system"
    parser.add_argument("output", type=new_folder, metavar="OUT", help=text)
    text = "all N folders, in any order"
    parser.add_argument("folders", type=local_path, nargs="+", metavar="FOLDER", help=text)


def _merge(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.merge import merge_datasets

    manifest = merge_datasets(args.output, args.folders)
    documents, rejected = manifest.documents, manifest.rejected
    print(f"documents {documents} = used {documents - rejected} + rejected {rejected}")
    print(f"samples {manifest.counts.samples}, images {manifest.counts.images}, shards {len(manifest.shards)}")
    print(f"wrote {args.output}; the merged folders are no longer needed")
    return ExitCode.DONE


def _add_split(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    parser.add_argument("output", type=new_name, metavar="OUT", help="prefix: OUT-1-of-N to OUT-N-of-N are written")
    text = "number of datasets, of about equal size"
    parser.add_argument("--number", type=positive, required=True, metavar="N", help=text)


def _split(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.merge import split_dataset
    from megatron_vlm.data.shards.manifest import load_manifest

    for folder in split_dataset(args.folder, args.output, args.number):
        counts = load_manifest(folder).counts
        print(f"wrote {folder}: samples {counts.samples}, images {counts.images}")
    return ExitCode.DONE


def _add_dedupe(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add = parser.add_argument
    add("output", type=new_folder, metavar="OUT", help="new folder, on the same file system")
    text = "what equal samples share: text and images, or only the images (the text if there are none)"
    add("--by", choices=("documents", "images"), required=True, help=text)
    add_workers(parser)


def _dedupe(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.deduplicate import deduplicate
    from megatron_vlm.data.shards.manifest import load_manifest

    before = load_manifest(args.folder).counts.samples
    manifest = deduplicate(args.folder, args.output, by=args.by, num_workers=args.workers)
    kept = manifest.counts.samples
    print(f"samples {before} = kept {kept} + dropped {before - kept}; shards {len(manifest.shards)}")
    print(f"wrote {args.output}")
    return ExitCode.DONE


_ACTIONS = {
    "verify": _Action(
        "compare every byte with the manifest; exit code 65 on any fault",
        "data verify shards/mmc4 --decode",
        _add_verify,
        _verify,
    ),
    "stats": _Action(
        "samples, images per sample and text tokens per image, read from the index only",
        "data stats shards/mmc4 --histograms plots",
        _add_stats,
        _stats,
    ),
    "inspect": _Action(
        "show samples as an HTML page: images, and text coloured by its loss mask; or what an iteration of a run holds",
        "data inspect shards/mmc4 --tokenizer T --output mmc4.html\ndata inspect runs/align --iteration 100 --text",
        _add_inspect,
        _inspect,
    ),
    "export": _Action(
        "write samples as WebDataset tars, for other programs or to prepare them again",
        "data export shards/mmc4 --format webdataset --tokenizer T --output tars/mmc4",
        _add_export,
        _export,
        kept="finished tars are kept",
    ),
    "merge": _Action(
        "join the folders written by prepare --part 1/N to N/N; nothing is copied",
        "data merge shards/mmc4 shards/mmc4.part-*",
        _add_merge,
        _merge,
    ),
    "split": _Action(
        "divide a dataset at shard boundaries; nothing is copied",
        "data split shards/mmc4 shards/mmc4 --number 4",
        _add_split,
        _split,
    ),
    "dedupe": _Action(
        "drop samples that repeat an earlier one; only shards that lose samples are rewritten",
        "data dedupe shards/coyo shards/coyo-unique --by images",
        _add_dedupe,
        _dedupe,
    ),
}
