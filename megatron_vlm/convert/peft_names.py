"""The files of a PEFT adapter, and the names in them."""

from megatron_vlm.convert.folder import rename

SETTINGS_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
OTHER_NAMES = ("adapter_model.bin", "non_lora_trainables.bin")
"""Files of older PEFT, and of the code of LLaVA and VILA for what learned beside the pairs."""
PROJECTOR = "multi_modal_projector"
"""Module of the projection in the table; PEFT saves it whole if it learned."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_WEIGHT = ".weight"
# PEFT uses the names of the model in memory; those of transformers before 4.52 are also the table's.
_IN_MEMORY = (
    (r"language_model\.model\.", "model.language_model."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
)
# The last three are the names of a LlamaForCausalLM and of the code of LLaVA and VILA.
_IN_TABLE = (
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.layers\.", "language_model.model.layers."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
)


def to_peft(name: str) -> str:
    """Return PEFT's name of a tensor, from its name in the table of the LLaVA family."""
    return _PREFIX + rename(name, _IN_MEMORY)


def from_peft(name: str) -> str:
    """Return the name in the table, from PEFT's; that of the adapted matrix for an A or B."""
    for suffix in (LORA_A, LORA_B):
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + _WEIGHT
    return rename(name.removeprefix(_PREFIX), _IN_TABLE)


def pair_names(name: str) -> tuple[str, str]:
    """Return PEFT's names of A and B of a matrix, from its name in the table."""
    module = to_peft(name).removesuffix(_WEIGHT)
    return module + LORA_A, module + LORA_B


def last_module(name: str) -> str:
    """Return the name of the linear layer alone, e.g. q_proj, by which PEFT's settings choose it."""
    return name.removesuffix(_WEIGHT).rpartition(".")[2]
