"""The options of `prepare`, kind by kind."""

import argparse

from megatron_vlm.cli.options import add_input, add_max_record_bytes, add_workers
from megatron_vlm.cli.values import local_path, location, new_folder, number, positive, seed, whole_number

EXAMPLES = {
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
DEFAULT_JPEG_QUALITY = 75
SOURCE_NAMES = {"interleaved": "mmc4", "pairs": "coyo", "conversations": "llava", "text": "text"}
_TEMPLATES = ("vicuna_v1", "plain", "llama_2", "hermes-2", "llama_3")
_TEMPLATE_HELP = (
    "plain is for the align stage; hermes-2 and llama_3 need a SentencePiece model with their pieces, which Llama 3's "
    "own tokenizer is not"
)
_VARIANTS = ("full", "pairs", "images-first", "text-only")


def add_kind(kinds: argparse._SubParsersAction, kind: str) -> None:
    """Add the command of one kind of corpus."""
    parser = kinds.add_parser(
        kind,
        help=_HELP[kind],
        description=_HELP[kind],
        epilog=f"{_MORE_HELP.get(kind, '')}example (T is a SentencePiece model):\n  megatron-vlm {EXAMPLES[kind]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, kind)
    _add_text(parser)
    if kind != "text":
        _add_images(parser)
    if kind == "interleaved":
        _add_interleaved(parser)
    if kind in ("conversations", "text"):
        _add_template(parser, kind)
    if kind == "conversations":
        _add_prompts(parser)


def _add_common(parser: argparse.ArgumentParser, kind: str) -> None:
    text = 'files, folders of them, or patterns; or URLs of these, "s3://bucket/mmc4/*.jsonl.gz" for example'
    add_input(parser, text)
    add = parser.add_argument
    add(
        "--output",
        type=new_folder,
        required=True,
        metavar="DIR",
        help="folder of the shards; new, or one to go on with",
    )
    add("--tokenizer", type=local_path, required=True, metavar="T", help="SentencePiece model, or a folder with one")
    name = SOURCE_NAMES[kind] + (", or that of --prompts" if kind == "conversations" else "")
    add("--source", metavar="NAME", help=f"name of its loss (default: {name})")
    add_workers(parser)
    add("--distributor", choices=("processes", "ray"), default="processes", help="ray: a cluster with a shared disk")
    add("--ray-address", metavar="A", help="of the cluster (default: RAY_ADDRESS, else one is started here)")
    add("--part", metavar="I/N", help="this part of the input files, into DIR.part-I-of-N; then: data merge")
    add("--max-shard-bytes", type=positive, default=4 << 30, metavar="N", help="size of a shard (default: 4 GiB)")
    add(
        "--drop-duplicates",
        choices=("documents", "images"),
        help="reject samples with the text and images, or the images, of an earlier one",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    add = group.add_argument
    add("--max-characters", type=positive, default=500_000, metavar="N", help="longest text of a document")
    add("--control-characters", action="store_true", help="take text with control characters")
    add("--keep-placeholders", action="store_true", help='keep a literal "<image>"; else "<IMAGE>"')
    add_max_record_bytes(group)


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add(
        "--images",
        type=location,
        metavar="DIR",
        help="folder of image files, or of tars; a tar, or a pattern of tars; or a URL of these, but of tars on a web "
        "server the pattern (default: the input's folder)",
    )
    add("--max-pixels", type=positive, default=50_000_000, metavar="N", help="largest image (default: %(default)s)")
    add("--min-side", type=whole_number(1), default=4, metavar="N", help="smallest shorter side (default: %(default)s)")
    add("--max-aspect-ratio", type=number(1), default=20.0, metavar="X", help="longest shape (default: %(default)s)")
    add("--max-image-bytes", type=positive, default=32 << 20, metavar="N", help="largest file (default: 32 MiB)")
    add("--min-image-bytes", type=whole_number(0), default=0, metavar="N", help="smallest file (default: %(default)s)")
    add("--decode-images", action="store_true", help="decode each image to find damage inside of it; slow")
    add("--resize-shorter-side", type=positive, metavar="N", help="encode larger images again (the paper: 336)")
    add(
        "--jpeg-quality",
        type=whole_number(1, 95),
        metavar="N",
        help=f"of images encoded again (default: {DEFAULT_JPEG_QUALITY})",
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
    add("--seed", type=seed, metavar="S", help="of the choice among the wordings (default: 0)")
