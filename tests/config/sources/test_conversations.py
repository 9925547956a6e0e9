from pathlib import Path
from typing import get_type_hints

from megatron_vlm.config.sources.conversations import Options, PromptOptions


def test_the_dataset_is_named_by_the_user_else_by_the_prompt_set():
    prompts = PromptOptions(prompts="vqav2")
    assert Options().dataset_name == "llava"
    assert Options(prompts=prompts).dataset_name == "vqav2"
    assert Options(prompts=prompts, source="mine").dataset_name == "mine"


def test_the_file_of_prompt_sets_is_where_the_help_says():
    text = get_type_hints(PromptOptions, include_extras=True)["prompts"].__metadata__[0].help
    assert (Path(__file__).parents[3] / text.split()[-1]).is_file()
