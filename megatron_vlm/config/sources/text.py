"""Options of `prepare text`."""

from dataclasses import dataclass
from typing import Annotated

from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import ConversationRules, Recipe
from megatron_vlm.config.sources.conversations import RECORD_FORMS

HELP = "FLAN: instructions without images, or plain text, in JSON or parquet"
EXAMPLE = "--input flan.jsonl --output shards/flan --tokenizer T"
NOTES = RECORD_FORMS + "  text                                     trained as it is\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of this kind."""

    source: Annotated[str, Option("dataset name, under which its loss is reported", metavar="NAME")] = "text"
    rules: Annotated[ConversationRules, Group("conversations", without=("image_position",))] = ConversationRules(
        system="none"
    )

    @property
    def dataset_name(self) -> str:
        """Name under which the loss is reported."""
        return self.source

    @property
    def images(self) -> None:
        """Text corpora have no images."""
        return None

    @property
    def recipe(self) -> Recipe:
        """The template brings BOS and EOS; so does the source for plain text."""
        return Recipe(bos=False, eos=False)
