"""Options of `prepare interleaved`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.checks import check_order
from megatron_vlm.config.errors import UsageError
from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import (
    MAX_RECORD_BYTES,
    ImageOptions,
    JoinRules,
    Recipe,
    RecordBytes,
    TextRules,
)

HELP = (
    "MMC4: JSON lines, with images in a folder, in tars or as base64; WebDataset or Energon: tars of texts and images; "
    "OBELICS: parquet files of texts and images"
)
EXAMPLE = "--input mmc4 --images mmc4/images --output shards/mmc4 --tokenizer T"
NOTES = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedRules:
    """How a record becomes a document; the defaults are those of the VILA paper and its code."""

    max_images: Annotated[int, Option("maximum number of images per document", least=1)] = 6
    keep_images: Annotated[
        Literal["first-listed", "first-in-text"],
        Option("which images to keep of more than --max-images: the first in image_info, or the first in the text"),
    ] = "first-listed"
    image_place: Annotated[Literal["before", "after"], Option("put an image before or after its matched sentence")] = (
        "before"
    )
    text_after_last_image: Annotated[
        Literal["keep", "drop"],
        Option("keep or drop the sentences that follow the sentence of the last image"),
    ] = "keep"
    min_images: Annotated[int, Option("reject documents with fewer images", least=0)] = 1
    bad_image: Annotated[
        Literal["document", "image"], Option("reject the whole document for a bad image, or only the image")
    ] = "document"
    min_similarity: Annotated[float | None, Option("leave out images with a lower matched_sim")] = None
    assignment: Annotated[
        Literal["listed", "linear", "best"],
        Option(
            "sentence of an image: listed (matched_text_index), or computed from similarity_matrix: linear (each "
            "image gets a sentence of its own where possible) or best (the most similar one)"
        ),
    ] = "listed"
    text: Annotated[TextRules, Group("text")] = TextRules()
    max_record_bytes: RecordBytes = MAX_RECORD_BYTES

    def __post_init__(self) -> None:
        check_order("--min-images", self.min_images, "--max-images", self.max_images)

    @property
    def want_matches(self) -> bool:
        """Whether a rule is about the match of images and sentences, which only MMC4's records have."""
        return self.min_similarity is not None or self.assignment != "listed" or self.image_place != "before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of this kind."""

    source: Annotated[str, Option("dataset name, under which its loss is reported", metavar="NAME")] = "mmc4"
    images: Annotated[ImageOptions, Group("images")] = ImageOptions()
    rules: Annotated[InterleavedRules, Group("documents; the defaults are the paper's")] = InterleavedRules()
    recipe: Annotated[Recipe, Group("samples")] = Recipe(join=JoinRules())

    def __post_init__(self) -> None:
        if self.recipe.variant == "pairs" and self.rules.image_place == "after":
            raise UsageError(
                "--variant pairs takes the sentence after an image, but --image-place after puts it before",
                fix="leave out --image-place",
            )

    @property
    def dataset_name(self) -> str:
        """Name under which the loss is reported."""
        return self.source
