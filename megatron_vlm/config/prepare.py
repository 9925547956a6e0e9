"""Options of `prepare` that all or several kinds of corpora share; each default stands here and nowhere else.

The options of one kind are in `config/sources/<kind>.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from megatron_vlm.config.checks import check_order
from megatron_vlm.config.options import Group, Option

MAX_RECORD_BYTES = 16 << 20
"""Longest JSON record that is read [bytes]."""
MAX_SHARD_BYTES = 4 << 30
"""A shard that reaches this size is followed by another [bytes]."""
MAX_SEED = 2**63 - 1
TemplateName = Literal["vicuna_v1", "plain", "llama_2", "hermes-2", "chatml", "llama_3"]
RecordBytes = Annotated[int, Option("longest JSON record [bytes]", least=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is read, where it goes, and which processes do the work."""

    input: Annotated[
        tuple[str, ...],
        Option('files, folders, or patterns; or URLs of these, e.g. "s3://bucket/mmc4/*.jsonl.gz"', path="location"),
    ]
    output: Annotated[
        Path, Option("folder for the shards; new, or unfinished to continue it", path="new_folder", metavar="DIR")
    ]
    tokenizer: Annotated[
        Path, Option("tokenizer.model, tokenizer.json, or a folder that holds one", path="local", metavar="T")
    ]
    workers: Annotated[int | None, Option("processes", least=1, default="one per core")] = None
    distributor: Annotated[Literal["processes", "ray"], Option("ray: use a cluster with a shared disk")] = "processes"
    ray_address: Annotated[
        str | None,
        Option(
            "address of the cluster",
            metavar="A",
            default="RAY_ADDRESS; if that is not set, a cluster is started here",
            needs="--distributor ray",
        ),
    ] = None
    part: Annotated[
        str | None,
        Option(
            "prepare only the I-th of N groups of input files, as task I of a job array, into DIR.part-I-of-N; join "
            "these folders with data merge",
            metavar="I/N",
        ),
    ] = None
    max_shard_bytes: Annotated[int, Option("size of a shard [bytes]", least=1)] = MAX_SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """Which text is accepted, and what is changed in it."""

    max_characters: Annotated[int, Option("longest text of a document [characters]", least=1)] = 500_000
    control_characters: Annotated[
        bool, Option("accept text with control characters other than tabs and line breaks")
    ] = False
    keep_placeholders: Annotated[
        bool, Option('keep a literal "<image>" in the text; otherwise it becomes "<IMAGE>", as in VILA\'s code')
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Which images are accepted, judged by the header only."""

    max_pixels: Annotated[int, Option("largest image, width * height [pixels]", least=1)] = 50_000_000
    min_side: Annotated[int, Option("smallest shorter side [pixels]", least=1)] = 4
    max_aspect_ratio: Annotated[float, Option("largest ratio of longer to shorter side", least=1)] = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """What is checked and changed in images at preparation."""

    limits: ImageLimits = ImageLimits()
    max_bytes: Annotated[int, Option("largest image file [bytes]", least=1, flag="--max-image-bytes")] = 32 << 20
    min_bytes: Annotated[int, Option("smallest image file [bytes]", least=0, flag="--min-image-bytes")] = 0
    decode: Annotated[
        bool,
        Option("decode each image, which finds damage that its structure does not show; slow", flag="--decode-images"),
    ] = False
    resize_shorter_side: Annotated[
        int | None,
        Option("shrink larger images to this shorter side and encode them as JPEG [pixels] (the paper: 336)", least=1),
    ] = None
    jpeg_quality: Annotated[
        int,
        Option(
            "quality of images encoded again; the paper's tooling used 75",
            least=1,
            most=95,
            needs="--resize-shorter-side",
        ),
    ] = 75

    def __post_init__(self) -> None:
        check_order("--min-image-bytes", self.min_bytes, "--max-image-bytes", self.max_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """Where images are, and which are accepted."""

    images: Annotated[
        str | None,
        Option(
            "folder of image files or of tars; or a tar, or a pattern of tars; or a URL of these (on a web server, "
            "tars need a pattern)",
            path="location",
            metavar="DIR",
            default="the folder of the input",
        ),
    ] = None
    rules: ImageRules = ImageRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRules:
    """How sentences and images become one running text.

    Source: VILA, llava/data/dataset.py, LazyMMC4Dataset: " ".join, then one blank beside each image removed.
    """

    separator: Annotated[str, Option("text between two sentences", default="a blank")] = " "
    keep_blanks: Annotated[bool, Option("keep the separators next to images")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a document becomes samples."""

    variant: Annotated[
        Literal["full", "pairs", "images-first", "text-only"],
        Option("form of the samples, for the paper's ablations"),
    ] = "full"
    join: JoinRules | None = None
    """How sentences are joined; None: the source has done it."""
    bos: Annotated[bool, Option("do not begin documents with BOS")] = True
    eos: Annotated[bool, Option("do not end documents with EOS")] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRules:
    """How a conversation becomes a document."""

    template: Annotated[
        TemplateName,
        Option(
            "conversation template; plain is for the align stage; hermes-2, chatml and llama_3 need a tokenizer with "
            "their special tokens"
        ),
    ] = "vicuna_v1"
    system: Annotated[
        str | None,
        Option(
            "system prompt: default (the template's own), none, or a text",
            default="default; none for text and with --prompts, as in VILA's code",
        ),
    ] = None
    image_position: Annotated[
        Literal["keep", "front"],
        Option("keep images where their placeholders are, or move them to the front of the question"),
    ] = "keep"
    text: Annotated[TextRules, Group("text")] = TextRules()
    max_record_bytes: RecordBytes = MAX_RECORD_BYTES


class KindOptions(Protocol):
    """What `Options` of every module of `config/sources` has."""

    rules: Any
    """How the source reads a document."""

    @property
    def dataset_name(self) -> str:
        """Name under which the loss of the dataset is reported."""

    @property
    def recipe(self) -> Recipe:
        """How its documents become samples."""

    @property
    def images(self) -> ImageOptions | None:
        """Where its images are; None: the corpus has none."""
