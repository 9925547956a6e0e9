from megatron_vlm.config.sources.conversations import Options, PromptOptions


def test_the_dataset_is_named_by_the_user_else_by_the_prompt_set():
    prompts = PromptOptions(prompts="vqav2")
    assert Options().dataset_name == "llava"
    assert Options(prompts=prompts).dataset_name == "vqav2"
    assert Options(prompts=prompts, source="mine").dataset_name == "mine"
