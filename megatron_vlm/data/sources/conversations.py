"""The kind `conversations`: instructions with images, or annotations worded by a prompt set."""

from dataclasses import replace

from megatron_vlm.config.sources.conversations import Options
from megatron_vlm.data.files.inputs import find_instruction_files
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.sources.instructions.conversations import ConversationSource
from megatron_vlm.data.sources.instructions.prompt_pools import load_prompt_set
from megatron_vlm.data.sources.instructions.prompted import PromptedSource, PromptRules
from megatron_vlm.data.text.templates import check_template, find_template
from megatron_vlm.data.text.tokenizer import Tokenizer


def find_source(
    paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer
) -> ConversationSource | PromptedSource:
    """Return the reader of conversations, or of annotations if the options name a prompt set."""
    rules, prompts = options.rules, options.prompts
    check_template(find_template(rules.template), tokenizer)
    if rules.system is None:  # VILA's code gives annotations no system prompt
        rules = replace(rules, system="default" if prompts.prompts is None else "none")
    files = find_instruction_files(paths)
    if prompts.prompts is None:
        return ConversationSource(files, rules)
    pool = load_prompt_set(prompts.prompts, prompts.prompt_file)
    return PromptedSource(files, PromptRules(prompts=pool, seed=prompts.seed, turns=rules))
