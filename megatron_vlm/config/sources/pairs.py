"""Options of `prepare pairs`."""

from dataclasses import dataclass
from typing import Annotated

from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import MAX_RECORD_BYTES, ImageOptions, Recipe, RecordBytes, TextRules

HELP = "COYO, LAION: tars written by img2dataset; or JSON lines and an image folder"
EXAMPLE = "--input coyo --output shards/coyo --tokenizer T"
NOTES = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """How an image and its caption become a document."""

    text: Annotated[TextRules, Group("text")] = TextRules()
    max_record_bytes: RecordBytes = MAX_RECORD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of this kind."""

    source: Annotated[str, Option("dataset name, under which its loss is reported", metavar="NAME")] = "coyo"
    images: Annotated[ImageOptions, Group("images")] = ImageOptions()
    rules: PairRules = PairRules()

    @property
    def dataset_name(self) -> str:
        """Name under which the loss is reported."""
        return self.source

    @property
    def recipe(self) -> Recipe:
        """BOS, the pair as the source gives it, EOS."""
        return Recipe()
