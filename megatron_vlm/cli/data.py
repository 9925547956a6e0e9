"""`megatron-vlm data {verify,stats,inspect,export,merge,split,dedupe}`."""

import argparse

from megatron_vlm.cli.options import add_workers
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.cli.values import local_path, new_file, new_folder, new_name, positive, seed, whole_number
from megatron_vlm.config import ExitCode

_EXAMPLES = {
    "verify": "data verify shards/mmc4 --decode",
    "stats": "data stats shards/mmc4 --histograms plots",
    "inspect": "data inspect shards/mmc4 --tokenizer T --output mmc4.html",
    "export": "data export shards/mmc4 --format webdataset --tokenizer T --output tars/mmc4",
    "merge": "data merge shards/mmc4 shards/mmc4.part-*",
    "split": "data split shards/mmc4 shards/mmc4 --number 4",
    "dedupe": "data dedupe shards/coyo shards/coyo-unique --by images",
}
_HELP = {
    "verify": "hold every byte against the manifest; exit code 65 on any fault",
    "stats": "samples, images per sample, text tokens per image; from the index alone",
    "inspect": "samples as an HTML page: pictures, text coloured by its mask",
    "export": "samples as WebDataset tars, for other programs or to prepare again",
    "merge": "join what prepare --part 1/N to N/N wrote; nothing is copied",
    "split": "divide a dataset at the borders of its shards; nothing is copied",
    "dedupe": "drop samples that repeat an earlier one; only shards that lose samples are written again",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="check, count, show, export and join prepared shards",
        epilog="examples:\n" + "\n".join(f"  megatron-vlm {example}" for example in _EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    parsers = {
        action: actions.add_parser(
            action,
            help=text,
            description=text,
            epilog=f"example:\n  megatron-vlm {_EXAMPLES[action]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for action, text in _HELP.items()
    }
    for action in ("verify", "stats", "inspect", "export", "split", "dedupe"):
        parsers[action].add_argument("folder", type=local_path, metavar="DIR", help="folder of shards")
    parsers["verify"].add_argument("--decode", action="store_true", help="decode every image as well")
    add = parsers["stats"].add_argument
    add("--json", action="store_true", help="as JSON")
    add("--histograms", type=new_folder, metavar="DIR", help="also draw histograms, as PNG in this folder")
    add = parsers["inspect"].add_argument
    add("--tokenizer", type=local_path, required=True, metavar="T", help="that of the shards")
    add("--output", type=new_file, required=True, metavar="FILE", help="the page")
    add("--samples", type=whole_number(0), nargs="+", default=[], metavar="I", help="these samples")
    add("--number", type=positive, default=20, metavar="N", help="or this many (default: %(default)s)")
    add("--seed", type=seed, metavar="S", help="a random choice; without it, the first ones")
    add = parsers["export"].add_argument
    add("--format", choices=("webdataset",), default="webdataset", help="tars: KEY.json, KEY.0.jpg, KEY.1.png, ...")
    add("--output", type=new_folder, required=True, metavar="OUT", help="folder of the tars; new, or one to go on with")
    add("--tokenizer", type=local_path, required=True, metavar="T", help="that of the shards")
    add("--samples-per-shard", type=positive, default=10_000, metavar="N", help="of a tar (default: %(default)s)")
    add = parsers["merge"].add_argument
    add("output", type=new_folder, metavar="OUT", help="new folder, on the file system of the parts")
    add("parts", type=local_path, nargs="+", metavar="PART", help="all parts, in any order")
    add = parsers["split"].add_argument
    add("output", type=new_name, metavar="OUT", help="writes OUT-1-of-N to OUT-N-of-N")
    add("--number", type=positive, required=True, metavar="N", help="datasets, of about equal size")
    add = parsers["dedupe"].add_argument
    add("output", type=new_folder, metavar="OUT", help="new folder, on the same file system")
    add(
        "--by",
        choices=("documents", "images"),
        required=True,
        help="what equal samples share: text and images, or the images (the text where there is none)",
    )
    for action in ("export", "dedupe"):
        add_workers(parsers[action])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    actions = {
        "verify": _verify,
        "stats": _stats,
        "inspect": _inspect,
        "export": _export,
        "merge": _merge,
        "split": _split,
        "dedupe": _dedupe,
    }
    with stops_at_once("finished tars are kept" if args.action == "export" else ""):
        return actions[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from megatron_vlm.data.shards.manifest import load_manifest
    from megatron_vlm.data.shards.verify import verify_dataset

    faults = 0
    for fault in verify_dataset(args.folder, decode=args.decode):
        faults += 1
        print(fault, flush=True)
    if faults:
        print(f"{args.folder}: {faults} faults; prepare the dataset again, or copy it again from where it is whole")
        return ExitCode.BAD_DATA
    manifest = load_manifest(args.folder)
    counts = manifest.counts
    print(
        f"{args.folder}: whole; {manifest.documents} documents = {manifest.documents - manifest.rejected} used + "
        f"{manifest.rejected} rejected; {counts.samples} samples, {counts.images} images, "
        f"{counts.text_tokens} text tokens"
    )
    return ExitCode.DONE


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


def _inspect(args: argparse.Namespace) -> int:
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


def _merge(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.merge import merge_datasets

    manifest = merge_datasets(args.output, args.parts)
    documents, rejected = manifest.documents, manifest.rejected
    print(f"documents {documents} = used {documents - rejected} + rejected {rejected}")
    print(f"samples {manifest.counts.samples}, images {manifest.counts.images}, shards {len(manifest.shards)}")
    print(f"wrote {args.output}; the parts are no longer needed")
    return ExitCode.DONE


def _split(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.merge import split_dataset
    from megatron_vlm.data.shards.manifest import load_manifest

    for folder in split_dataset(args.folder, args.output, args.number):
        counts = load_manifest(folder).counts
        print(f"wrote {folder}: samples {counts.samples}, images {counts.images}")
    return ExitCode.DONE


def _dedupe(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.deduplicate import deduplicate
    from megatron_vlm.data.shards.manifest import load_manifest

    before = load_manifest(args.folder).counts.samples
    manifest = deduplicate(args.folder, args.output, by=args.by, num_workers=args.workers)
    kept = manifest.counts.samples
    print(f"samples {before} = kept {kept} + dropped {before - kept}; shards {len(manifest.shards)}")
    print(f"wrote {args.output}")
    return ExitCode.DONE
