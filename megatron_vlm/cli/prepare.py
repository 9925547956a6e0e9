"""`megatron-vlm prepare {interleaved,pairs,conversations,text}`: raw corpus to shards."""

import argparse
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from megatron_vlm.cli.numbers import number, positive, whole_number
from megatron_vlm.cli.paths import local_path, new_folder
from megatron_vlm.config import ConfigError, ExitCode, UsageError
from megatron_vlm.data.sources.locations import (
    RemoteFile,
    can_list,
    check_suffixes,
    folder_of,
    is_folder,
    list_location,
    names_files,
    parse_location,
)

if TYPE_CHECKING:
    from megatron_vlm.data.documents import TextRules
    from megatron_vlm.data.image_check import ImageRules
    from megatron_vlm.data.manifest import Manifest
    from megatron_vlm.data.part import ImagePlace
    from megatron_vlm.data.prepare import PrepareJob
    from megatron_vlm.data.sources.source import Source

_EXAMPLES = {
    "interleaved": "prepare interleaved --input mmc4 --images mmc4/images --output shards/mmc4 --tokenizer T",
    "pairs": "prepare pairs --input coyo --output shards/coyo --tokenizer T",
    "conversations": "prepare conversations --input llava/instructions.json --images llava --output shards/llava "
    "--tokenizer T",
    "text": "prepare text --input flan.jsonl --output shards/flan --tokenizer T",
}
_HELP = {
    "interleaved": "MMC4: JSON lines, with images in a folder, in tars or as base64; WebDataset or Energon: tars of "
    "texts and images; OBELICS: parquet of texts and images",
    "pairs": "COYO, LAION: tars of img2dataset, with or without parquet; or JSON lines and an image folder",
    "conversations": "LLaVA, ShareGPT4V, M3IT, annotations: instructions with images, in JSON or parquet",
    "text": "FLAN: instructions without images, or running text, in JSON or parquet",
}
_FORMS = """forms of a record, found out by its fields:
  conversations: [{from, value}, ...]      LLaVA, ShareGPT4V
  messages: [{role, content}, ...]         OpenAI; content is a text, or a list of text and image parts
  instruction, inputs, outputs             M3IT
  instruction, input, output               Alpaca; also instruction, context, response
  question, answer                         also question, response; prompt, response; prompt, completion
  inputs, targets                          FLAN
"""
_MORE_HELP = {
    "conversations": _FORMS
    + """Images are in image or images (a path, a data: URI, {bytes, path}, or the URL of a picture that the tars of
--images have; nothing is downloaded) or image_base64_str, one or a list.
With --prompts SET, records are annotations of that data set instead.

""",
    "text": _FORMS + "  text                                     trained as it is\n\n",
}
_SOURCE_NAMES = {"interleaved": "mmc4", "pairs": "coyo", "conversations": "llava", "text": "text"}
_TEMPLATES = ("vicuna_v1", "plain", "llama_2", "hermes-2", "llama_3")
_TEMPLATE_HELP = (
    "plain is for the align stage; hermes-2 and llama_3 need a SentencePiece model with their pieces, which Llama 3's "
    "own tokenizer is not"
)
_VARIANTS = ("full", "pairs", "images-first", "text-only")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "prepare",
        help="raw corpus to shards; parallel, resumable, every reject listed",
        epilog="examples (T is a SentencePiece model):\n"
        + "\n".join(f"  megatron-vlm {example}" for example in _EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, text in _HELP.items():
        options = kinds.add_parser(
            kind,
            help=text,
            description=text,
            epilog=f"{_MORE_HELP.get(kind, '')}example (T is a SentencePiece model):\n  megatron-vlm {_EXAMPLES[kind]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(options, kind)
        if kind != "text":
            _add_images(options)
        if kind == "interleaved":
            _add_interleaved(options)
        if kind in ("conversations", "text"):
            _add_template(options, kind)
        if kind == "conversations":
            _add_prompts(options)
    parser.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument
    add(
        "--input",
        type=parse_location,
        nargs="+",
        required=True,
        metavar="PATH",
        help='files, folders of them, or patterns; or URLs of these, "s3://bucket/mmc4/*.jsonl.gz" for example',
    )
    add(
        "--output",
        type=new_folder,
        required=True,
        metavar="DIR",
        help="folder of the shards; new, or one to go on with",
    )
    add("--tokenizer", type=local_path, required=True, metavar="T", help="SentencePiece model, or a folder with one")
    add("--source", default=_SOURCE_NAMES[kind], metavar="NAME", help="name of its loss (default: %(default)s)")
    add(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one a core)",
    )
    add("--distributor", choices=("processes", "ray"), default="processes", help="ray: a cluster with a shared disk")
    add("--ray-address", metavar="A", help="of the cluster (default: RAY_ADDRESS, else one is started here)")
    add("--part", metavar="I/N", help="this part of the input files, into DIR.part-I-of-N; then: data merge")
    add("--max-shard-bytes", type=positive, default=4 << 30, metavar="N", help="size of a shard (default: 4 GiB)")
    add(
        "--drop-duplicates",
        choices=("documents", "images"),
        help="reject samples with the text and images, or the images, of an earlier one",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--max-characters", type=positive, default=500_000, metavar="N", help="longest text of a document"
    )
    text.add_argument("--control-characters", action="store_true", help="take text with control characters")
    text.add_argument("--keep-placeholders", action="store_true", help='keep a literal "<image>"; else "<IMAGE>"')
    text.add_argument("--max-record-bytes", type=positive, default=16 << 20, metavar="N", help="longest JSON record")


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add(
        "--images",
        type=parse_location,
        metavar="DIR",
        help="folder of image files, or of tars; a tar, or a pattern of tars; or a URL of these (default: the input's "
        "folder)",
    )
    add(
        "--max-pixels",
        type=positive,
        default=50_000_000,
        metavar="N",
        help="largest image (default: %(default)s)",
    )
    add("--min-side", type=whole_number(1), default=4, metavar="N", help="smallest shorter side (default: %(default)s)")
    add("--max-aspect-ratio", type=number(1), default=20.0, metavar="X", help="longest shape (default: %(default)s)")
    add("--max-image-bytes", type=positive, default=32 << 20, metavar="N", help="largest file (default: 32 MiB)")
    add("--min-image-bytes", type=whole_number(0), default=0, metavar="N", help="smallest file (default: %(default)s)")
    add("--decode-images", action="store_true", help="decode each image to find damage inside of it; slow")
    add("--resize-shorter-side", type=positive, metavar="N", help="encode larger images again (the paper: 336)")
    add(
        "--jpeg-quality",
        type=whole_number(1, 95),
        default=75,
        metavar="N",
        help="of images encoded again (default: %(default)s)",
    )


def _add_interleaved(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("documents; the defaults are the paper's").add_argument
    add("--variant", choices=_VARIANTS, default="full", help="form of the samples, for ablations")
    add("--max-images", type=positive, default=6, metavar="N", help="images of a document (default: %(default)s)")
    add(
        "--min-images",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="reject documents with fewer (default: %(default)s)",
    )
    add(
        "--keep-images",
        choices=("first-listed", "first-in-text"),
        default="first-listed",
        help="which of more than --max-images: first in image_info, or in the text (default: %(default)s)",
    )
    add(
        "--image-place",
        choices=("before", "after"),
        default="before",
        help="side of its sentence that an image stands on (default: %(default)s)",
    )
    add(
        "--text-after-last-image",
        choices=("keep", "drop"),
        default="keep",
        help="drop: the sentences after that of the last image (default: %(default)s)",
    )
    add("--bad-image", choices=("document", "image"), default="document", help="what a bad image rejects")
    add("--min-similarity", type=number(), metavar="X", help="leave out images with a lower matched_sim")
    add(
        "--assignment",
        choices=("listed", "linear", "best"),
        default="listed",
        help="sentence of an image: matched_text_index, or from similarity_matrix (linear: of its own, if it can be)",
    )
    add("--separator", default=" ", metavar="TEXT", help="between sentences (default: a blank)")
    add("--keep-blanks", action="store_true", help="keep the separators beside images")
    add("--no-bos", action="store_true", help="do not begin documents with BOS")
    add("--no-eos", action="store_true", help="do not end documents with EOS")


def _add_template(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument_group("conversations").add_argument
    add("--template", choices=_TEMPLATES, default="vicuna_v1", help=_TEMPLATE_HELP)
    add(
        "--system",
        metavar="TEXT",
        help="system prompt: default (the template's), none, or a text (default: "
        + ("none)" if kind == "text" else "default; with --prompts none, as VILA's code)"),
    )
    if kind == "conversations":
        add("--image-position", choices=("keep", "front"), default="keep", help="front: before the question's text")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts for annotations").add_argument
    add(
        "--prompts",
        metavar="SET",
        help="ask in the wordings of this set, e.g. vqav2; see data/sources/prompt_pools.yaml",
    )
    add("--prompt-file", type=local_path, metavar="YAML", help="sets of your own (default: the 18 of the paper)")
    add("--seed", type=int, metavar="S", help="of the choice among the wordings (default: 0)")


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: what is on the disk is as whole after this as after a kill, and workers die with this process."""
    name = signal.Signals(number).name
    line = f"megatron-vlm: stopped by {name}; run the same command again, finished input files are kept\n"
    try:
        os.write(2, line.encode())  # not sys.stderr: it may be in the middle of a write itself
    finally:
        os._exit(ExitCode.REQUEUE)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    if threading.current_thread() is not threading.main_thread():
        return _run(args)  # where no handler can be set
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _run(args)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _run(args: argparse.Namespace) -> int:
    from megatron_vlm.data.part import PartJob
    from megatron_vlm.data.prepare import PrepareJob, prepare
    from megatron_vlm.data.share import Share
    from megatron_vlm.data.templates import check_template, find_template
    from megatron_vlm.data.tokenizer import load_tokenizer

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
    job = PrepareJob(output=output, source_name=_source_name(args), part=part, share=share)
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
    if args.kind == "interleaved" and args.variant == "pairs" and args.image_place == "after":
        raise UsageError(
            "--variant pairs takes the sentence after an image, --image-place after puts it before",
            fix="leave out --image-place",
        )


def _prepare_on_ray(job: "PrepareJob", address: str | None, num_workers: int) -> "Manifest":
    from megatron_vlm.data.prepare import prepare
    from megatron_vlm.data.ray_engine import ray_cluster

    # Ray reports its use to its makers, and tells of its plans for GPUs, unless told not to.
    for variable in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(variable, "0")
    with ray_cluster(address, num_workers=num_workers) as engine:
        return prepare(job, engine=engine)


def _source(args: argparse.Namespace) -> "Source":
    from megatron_vlm.data.sources.interleaved import InterleavedRules, find_interleaved_source
    from megatron_vlm.data.sources.pairs import PairRules, find_pair_source

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
    from megatron_vlm.data.sources.conversations import ConversationRules, ConversationSource
    from megatron_vlm.data.sources.prompt_pools import load_prompt_set
    from megatron_vlm.data.sources.prompted import PromptedSource, PromptRules
    from megatron_vlm.data.sources.table_records import find_instruction_files
    from megatron_vlm.data.sources.text import TextSource

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
        if args.prompt_file is not None or args.seed is not None:
            raise UsageError(
                "--prompt-file and --seed are for --prompts", fix="name a set with --prompts, or leave them out"
            )
        return ConversationSource(files, rules)
    prompts = load_prompt_set(args.prompts, args.prompt_file)
    return PromptedSource(files, PromptRules(prompts=prompts, seed=args.seed or 0, turns=rules))


def _source_name(args: argparse.Namespace) -> str:
    """Return the name of the loss; annotations are called as their set, if the user names nothing."""
    is_default = args.source == _SOURCE_NAMES[args.kind]
    return args.prompts if is_default and getattr(args, "prompts", None) else args.source


def _recipe(args: argparse.Namespace):
    from megatron_vlm.data.documents import JoinRules
    from megatron_vlm.data.part import Recipe

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
    from megatron_vlm.data.image_check import ImageRules
    from megatron_vlm.data.images import ImageLimits

    if args.kind == "text":
        return ImageRules()
    return ImageRules(
        limits=ImageLimits(max_pixels=args.max_pixels, min_side=args.min_side, max_aspect_ratio=args.max_aspect_ratio),
        max_bytes=args.max_image_bytes,
        min_bytes=args.min_image_bytes,
        decode=args.decode_images,
        resize_shorter_side=args.resize_shorter_side,
        jpeg_quality=args.jpeg_quality,
    )


def _image_place(args: argparse.Namespace) -> "ImagePlace":
    from megatron_vlm.data.part import ImagePlace

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
    from megatron_vlm.data.joining import describe_rejects

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
