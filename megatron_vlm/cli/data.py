"""`megatron-vlm data {verify,stats,inspect,merge,split}`."""

import argparse
from pathlib import Path

from megatron_vlm.config import ExitCode

_EXAMPLES = """examples:
  megatron-vlm data verify shards/mmc4 --decode
  megatron-vlm data stats shards/mmc4 --histograms plots
  megatron-vlm data inspect shards/mmc4 --tokenizer T --output mmc4.html
  megatron-vlm data merge shards/mmc4 shards/mmc4.part-*
  megatron-vlm data split shards/mmc4 shards/mmc4 --number 4
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="check, count and show prepared shards",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="hold every byte against the manifest; exit code 65 on any fault")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--decode", action="store_true", help="decode every image as well")
    stats = actions.add_parser("stats", help="samples, images per sample, text tokens per image; from the index alone")
    stats.add_argument("folder", type=Path, metavar="DIR")
    stats.add_argument("--json", action="store_true", help="as JSON")
    stats.add_argument("--histograms", type=Path, metavar="DIR", help="also draw histograms, as PNG in this folder")
    inspect = actions.add_parser("inspect", help="samples as an HTML page: pictures, text coloured by its mask")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--tokenizer", type=Path, required=True, metavar="T", help="that of the shards")
    inspect.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page")
    inspect.add_argument("--samples", type=int, nargs="+", default=[], metavar="I", help="these samples")
    inspect.add_argument("--number", type=int, default=20, metavar="N", help="or this many (default: %(default)s)")
    inspect.add_argument("--seed", type=int, metavar="S", help="a random choice; without it, the first ones")
    merge = actions.add_parser("merge", help="join what prepare --part 1/N to N/N wrote; hard links, nothing is copied")
    merge.add_argument("output", type=Path, metavar="OUT", help="new folder, on the file system of the parts")
    merge.add_argument("parts", type=Path, nargs="+", metavar="PART", help="all parts, in any order")
    split = actions.add_parser("split", help="divide a dataset at the borders of its shards; nothing is copied")
    split.add_argument("folder", type=Path, metavar="DIR")
    split.add_argument("output", type=Path, metavar="OUT", help="writes OUT-1-of-N to OUT-N-of-N")
    split.add_argument("--number", type=int, required=True, metavar="N", help="datasets, of about equal size")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    actions = {"verify": _verify, "stats": _stats, "inspect": _inspect, "merge": _merge, "split": _split}
    return actions[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from megatron_vlm.data.manifest import load_manifest
    from megatron_vlm.data.verify import verify_dataset

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

    from megatron_vlm.data.shards import ShardedDataset
    from megatron_vlm.data.statistics import compute_statistics, format_statistics, save_histograms

    statistics = compute_statistics(ShardedDataset.open(args.folder))
    print(json.dumps(dataclasses.asdict(statistics), indent=1) if args.json else format_statistics(statistics))
    if args.histograms:
        for path in save_histograms(statistics, args.histograms):
            if not args.json:
                print(f"wrote {path}")
    return ExitCode.DONE


def _inspect(args: argparse.Namespace) -> int:
    from megatron_vlm.data.inspection import choose_samples, render_page
    from megatron_vlm.data.shards import ShardedDataset
    from megatron_vlm.data.tokenizer import load_tokenizer

    dataset = ShardedDataset.open(args.folder)
    indices = choose_samples(len(dataset), number=args.number, seed=args.seed, indices=args.samples)
    page = render_page(dataset, load_tokenizer(args.tokenizer), indices)
    args.output.write_text(page, encoding="utf-8")
    print(f"wrote {len(indices)} samples to {args.output}")
    return ExitCode.DONE


def _merge(args: argparse.Namespace) -> int:
    from megatron_vlm.data.merge import merge_datasets

    manifest = merge_datasets(args.output, args.parts)
    documents, rejected = manifest.documents, manifest.rejected
    print(f"documents {documents} = used {documents - rejected} + rejected {rejected}")
    print(f"samples {manifest.counts.samples}, images {manifest.counts.images}, shards {len(manifest.shards)}")
    print(f"wrote {args.output}; the parts are no longer needed")
    return ExitCode.DONE


def _split(args: argparse.Namespace) -> int:
    from megatron_vlm.data.manifest import load_manifest
    from megatron_vlm.data.merge import split_dataset

    for folder in split_dataset(args.folder, args.output, args.number):
        counts = load_manifest(folder).counts
        print(f"wrote {folder}: samples {counts.samples}, images {counts.images}")
    return ExitCode.DONE
