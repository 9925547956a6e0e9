"""The kind `text`: instructions without images, or plain text."""

from megatron_vlm.config.sources.text import Options
from megatron_vlm.data.files.inputs import find_instruction_files
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.sources.instructions.text import TextSource
from megatron_vlm.data.text.templates import check_template, find_template
from megatron_vlm.data.text.tokenizer import Tokenizer


def find_source(paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer) -> TextSource:
    """Return the reader of the files.

    Raises:
        ConfigError: the tokenizer does not fit the template, or a path does not exist.
    """
    check_template(find_template(options.rules.template), tokenizer)
    return TextSource(find_instruction_files(paths), options.rules)
