"""`megatron-vlm prepare {interleaved,pairs,conversations,text}`: raw corpus to shards."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.prepare_options import DEFAULT_JPEG_QUALITY, EXAMPLES, SOURCE_NAMES, add_kind
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.config import ConfigError, ExitCode, UsageError
from megatron_vlm.data.files.locations import (
    RemoteFile,
    can_list,
    check_suffixes,
    folder_of,
    is_folder,
    list_location,
    names_files,
)

if TYPE_CHECKING:
    from megatron_vlm.data.documents import TextRules
    from megatron_vlm.data.images.checking import ImageRules
    from megatron_vlm.data.prepare.part import ImagePlace
    from megatron_vlm.data.prepare.run import PrepareJob
    from megatron_vlm.data.shards.manifest import Manifest
    from megatron_vlm.data.sources.source import Source


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "prepare",
        help="raw corpus to shards; parallel, resumable, every reject listed",
        epilog="examples (T is a SentencePiece model):\n"
        + "\n".join(f"  megatron-vlm {example}" for example in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind in EXAMPLES:
        add_kind(kinds, kind)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    with stops_at_once("finished input files are kept"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from megatron_vlm.data.prepare.part import PartJob
    from megatron_vlm.data.prepare.run import PrepareJob, prepare
    from megatron_vlm.data.prepare.share import Share
    from megatron_vlm.data.text.templates import check_template, find_template
    from megatron_vlm.data.text.tokenizer import load_tokenizer

    _check_options(args)
    tokenizer = load_tokenizer(args.tokenizer)
    if "template" in args:
        check_template(find_template(args.template), tokenizer)
    part = PartJob(
        source=_source(args),
        recipe=_recipe(args),
        tokenizer=args.tokenizer,
        images=_image_place(args),
        image_rules=_image_rules(args),
        max_shard_bytes=args.max_shard_bytes,
        drop_duplicates=args.drop_duplicates,
    )
    share = Share.parse(args.part) if args.part is not None else None
    output = args.output if share is None else share.folder(args.output)
    source_name = args.source or getattr(args, "prompts", None) or SOURCE_NAMES[args.kind]
    job = PrepareJob(output=output, source_name=source_name, part=part, share=share)
    if args.distributor == "ray":
        manifest = _prepare_on_ray(job, args.ray_address or os.environ.get("RAY_ADDRESS"), args.workers)
    else:
        manifest = prepare(job, num_workers=args.workers)
    _report(output, manifest)
    return ExitCode.DONE


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other before anything is read.

    Raises:
        UsageError: they leave nothing, or the loss would have no name.
    """
    if args.source is not None and not args.source.strip():
        raise UsageError("--source is empty", fix="name the loss of the dataset, or leave it out")
    for name in ("images", "image_bytes"):
        least, most = getattr(args, f"min_{name}", None), getattr(args, f"max_{name}", None)
        if least is not None and most is not None and least > most:
            option = name.replace("_", "-")
            raise UsageError(
                f"--min-{option} {least} is above --max-{option} {most}", fix="lower the one, or raise the other"
            )
    if args.distributor != "ray" and args.ray_address is not None:
        raise UsageError("--ray-address is for --distributor ray", fix="add it, or leave out --ray-address")
    if getattr(args, "jpeg_quality", None) is not None and args.resize_shorter_side is None:
        raise UsageError("--jpeg-quality is for --resize-shorter-side", fix="add it, or leave out --jpeg-quality")
    if args.kind == "conversations" and args.prompts is None and (args.prompt_file or args.seed is not None):
        raise UsageError(
            "--prompt-file and --seed are for --prompts", fix="name a set with --prompts, or leave them out"
        )
    if args.kind == "interleaved" and args.variant == "pairs" and args.image_place == "after":
        raise UsageError(
            "--variant pairs takes the sentence after an image, --image-place after puts it before",
            fix="leave out --image-place",
        )


def _prepare_on_ray(job: "PrepareJob", address: str | None, num_workers: int) -> "Manifest":
    from megatron_vlm.data.prepare.run import prepare
    from megatron_vlm.data.tasks.ray_engine import ray_cluster

    # Ray reports its use to its makers, and tells of its plans for GPUs, unless told not to.
    for variable in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(variable, "0")
    with ray_cluster(address, num_workers=num_workers) as engine:
        return prepare(job, engine=engine)


def _source(args: argparse.Namespace) -> "Source":
    from megatron_vlm.data.sources.interleaved.source import InterleavedRules, find_interleaved_source
    from megatron_vlm.data.sources.pairs.source import PairRules, find_pair_source

    paths, text, limit = tuple(args.input), _text_rules(args), args.max_record_bytes
    if args.kind == "pairs":
        return find_pair_source(paths, PairRules(text=text, max_record_bytes=limit))
    if args.kind == "interleaved":
        rules = InterleavedRules(
            max_images=args.max_images,
            min_images=args.min_images,
            keep_images=args.keep_images,
            image_place=args.image_place,
            text_after_last_image=args.text_after_last_image,
            bad_image=args.bad_image,
            min_similarity=args.min_similarity,
            assignment=args.assignment,
            text=text,
            max_record_bytes=limit,
        )
        return find_interleaved_source(paths, rules)
    return _instruction_source(args)


def _instruction_source(args: argparse.Namespace) -> "Source":
    from megatron_vlm.data.files.inputs import find_instruction_files
    from megatron_vlm.data.sources.instructions.conversations import ConversationRules, ConversationSource
    from megatron_vlm.data.sources.instructions.prompt_pools import load_prompt_set
    from megatron_vlm.data.sources.instructions.prompted import PromptedSource, PromptRules
    from megatron_vlm.data.sources.instructions.text import TextSource

    bare = args.kind == "text" or args.prompts is not None
    rules = ConversationRules(
        template=args.template,
        system=args.system if args.system is not None else "none" if bare else "default",
        image_position="keep" if args.kind == "text" else args.image_position,
        text=_text_rules(args),
        max_record_bytes=args.max_record_bytes,
    )
    files = find_instruction_files(tuple(args.input))
    if args.kind == "text":
        return TextSource(files, rules)
    if args.prompts is None:
        return ConversationSource(files, rules)
    prompts = load_prompt_set(args.prompts, args.prompt_file)
    return PromptedSource(files, PromptRules(prompts=prompts, seed=args.seed or 0, turns=rules))


def _recipe(args: argparse.Namespace):
    from megatron_vlm.data.documents import JoinRules
    from megatron_vlm.data.prepare.part import Recipe

    if args.kind == "interleaved":
        join = JoinRules(separator=args.separator, trim_at_images=not args.keep_blanks)
        return Recipe(variant=args.variant, join=join, bos=not args.no_bos, eos=not args.no_eos)
    return Recipe() if args.kind == "pairs" else Recipe(bos=False, eos=False)


def _text_rules(args: argparse.Namespace) -> "TextRules":
    from megatron_vlm.data.documents import TextRules

    return TextRules(
        max_characters=args.max_characters,
        control_characters=args.control_characters,
        placeholder="keep" if args.keep_placeholders else "upper",
    )


def _image_rules(args: argparse.Namespace) -> "ImageRules":
    from megatron_vlm.data.images.checking import ImageRules
    from megatron_vlm.data.images.decoding import ImageLimits

    if args.kind == "text":
        return ImageRules()
    return ImageRules(
        limits=ImageLimits(max_pixels=args.max_pixels, min_side=args.min_side, max_aspect_ratio=args.max_aspect_ratio),
        max_bytes=args.max_image_bytes,
        min_bytes=args.min_image_bytes,
        decode=args.decode_images,
        resize_shorter_side=args.resize_shorter_side,
        jpeg_quality=args.jpeg_quality or DEFAULT_JPEG_QUALITY,
    )


def _image_place(args: argparse.Namespace) -> "ImagePlace":
    from megatron_vlm.data.prepare.part import ImagePlace

    if args.kind == "text":
        return ImagePlace()
    if args.images is None:
        folder = folder_of(args.input[0])
    elif names_files(args.images):
        tars = list_location(args.images, (".tar",), "--images")
        check_suffixes(tars, (".tar",), "--images")
        return ImagePlace(tars=tuple(tars))
    else:
        folder = args.images
    # Of a bucket in which the user may read files without listing them, nobody can tell; nor has he named this folder.
    is_given = args.images is not None or not isinstance(folder, RemoteFile)
    if is_given and not is_folder(folder):
        raise ConfigError("image folder does not exist", where=str(folder), fix="check --images")
    tars = list_location(folder, (".tar",), "--images") if args.images is not None and can_list(folder) else []
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
