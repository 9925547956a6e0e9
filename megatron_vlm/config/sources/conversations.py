"""Options of `prepare conversations`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import MAX_SEED, ConversationRules, ImageOptions, Recipe

HELP = "LLaVA, ShareGPT4V, M3IT, annotations: instructions with images, in JSON or parquet"
EXAMPLE = "--input llava/instructions.json --images llava --output shards/llava --tokenizer T"
RECORD_FORMS = """forms of a record, recognised by its fields:
  conversations: [{from, value}, ...]      LLaVA, ShareGPT4V
  messages: [{role, content}, ...]         OpenAI; content is a text, or a list of text and image parts
  instruction, inputs, outputs             M3IT
  instruction, input, output               Alpaca; also instruction, context, response
  question, answer                         also question, response; prompt, response; prompt, completion
  inputs, targets                          FLAN
"""
NOTES = (
    RECORD_FORMS
    + """Images are in image or images (a path, a data: URI, {bytes, path}, or the URL of an image in the tars of
--images; nothing is downloaded) or in image_base64_str; each holds one image or a list.
With --prompts SET, records are annotations of that dataset instead.
"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How annotations become questions."""

    prompts: Annotated[
        str | None,
        Option(
            "ask with the wordings of this set, e.g. vqav2; sets are in "
            "megatron_vlm/data/sources/instructions/prompt_pools.yaml",
            metavar="SET",
        ),
    ] = None
    prompt_file: Annotated[
        Path | None,
        Option(
            "YAML file with sets of your own",
            path="local",
            metavar="YAML",
            default="the paper's 18 sets",
            needs="--prompts",
        ),
    ] = None
    seed: Annotated[
        int,
        Option("seed for choosing wordings", least=0, most=MAX_SEED, metavar="S", needs="--prompts"),
    ] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of this kind."""

    source: Annotated[
        str | None,
        Option(
            "dataset name, under which its loss is reported", metavar="NAME", default="llava, or the set of --prompts"
        ),
    ] = None
    images: Annotated[ImageOptions, Group("images")] = ImageOptions()
    rules: Annotated[ConversationRules, Group("conversations")] = ConversationRules()
    prompts: Annotated[PromptOptions, Group("prompts for annotations")] = PromptOptions()

    @property
    def dataset_name(self) -> str:
        """Name under which the loss is reported."""
        return self.source if self.source is not None else self.prompts.prompts or "llava"

    @property
    def recipe(self) -> Recipe:
        """The template brings BOS and EOS."""
        return Recipe(bos=False, eos=False)
