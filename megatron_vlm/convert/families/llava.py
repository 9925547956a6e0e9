"""The LLaVA family: a tower, a projector of two layers and a language model in one folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig
from megatron_vlm.config.towers import TowerConfig, TowerWrapper
from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.convert.family import (
    Parts,
    Serving,
    TowerFamily,
    decoder_family,
    find_family,
    find_tower_family,
    refuse_tower,
)
from megatron_vlm.convert.files.language import write_language_files
from megatron_vlm.convert.files.model_card import CardFormat, write_card
from megatron_vlm.convert.files.processor import select_strategy, write_processor
from megatron_vlm.convert.folder import CONFIG_NAME, write_json
from megatron_vlm.convert.projector import LlavaProjector, llava_projector, projector_of
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.whole_model import join_patterns, join_rules, prefixed, refusal

PART = "model"
MODEL_TYPES = ("llava", "LlavaForConditionalGeneration")
ARCHITECTURE = "LlavaForConditionalGeneration"
_CARD = CardFormat(
    title=f"A vision-language model for `{ARCHITECTURE}`",
    library="transformers",
    usage="""
With transformers 4.57 or later, where `FOLDER` is the folder of this file:

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(FOLDER)
model = LlavaForConditionalGeneration.from_pretrained(FOLDER)
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}])
inputs = processor(images=Image.open("picture.jpg"), text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

With vLLM: `vllm serve FOLDER`, then OpenAI's chat endpoint. Folders without `chat_template.jinja` take plain prompts.
""",
)
_DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_LANGUAGE, _VISION, _PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."


def renames(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return renames to the names of transformers 4; in memory, the names of other versions start with `model.`."""
    vision = _vision_settings(settings)
    tower = find_family(vision["model_type"], "vision", "vision_config of config.json")
    return [
        (r"(model\.)?language_model\.model\.", "language_model.model."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
        *(
            (rf"(?:model\.)?vision_tower\.{pattern}", f"vision_tower.{replacement}")
            for pattern, replacement in tower.renames(vision)
        ),
        (r"model\.vision_tower\.", "vision_tower."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    ]


def find_parts(path: Path, settings: dict[str, Any], tower: Path | None) -> Parts:
    """Return that everything is in one folder."""
    refuse_tower(path, tower)
    return Parts.of_one_folder(path, settings)


def reason_against(model: ModelConfig) -> str | None:
    """Return what the class cannot compute."""
    return refusal(model, rules, config_to_hf)


def _vision_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the section of the tower, or what transformers' LlavaConfig has in its place: CLIP ViT-L/14 at 336."""
    section: dict[str, Any] | None = settings.get("vision_config")
    return _DEFAULT_VISION if section is None else {"model_type": _DEFAULT_VISION["model_type"], **section}


def _tower_family(vision: TowerConfig) -> TowerFamily:
    """Return the family of the tower.

    Raises:
        CheckpointError: it has none, or transformers' class cannot compute with the tower.
    """
    if isinstance(vision, TowerWrapper):
        reason: str | None = "transformers' Llava sees an image at one size"
    else:
        family = find_tower_family(vision.type)
        reason = family.reason_against_llava(vision)
    if reason is not None:
        raise CheckpointError(
            f"a tower of type {vision.type} does not fit the format llava: {reason}",
            where="model.vision",
            fix="use another tower or format",
        )
    return family


def _tower(model: ModelConfig) -> VisionTransformerConfig:
    """Return the settings of the tower; all towers that fit the format are vision transformers."""
    _tower_family(model.vision)
    return cast(VisionTransformerConfig, model.vision)


def _projector(model: ModelConfig) -> LlavaProjector:
    sizes = {"input_size": model.vision.feature_size, "output_size": model.language.hidden_size}
    return llava_projector(model.projection, **sizes)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of the whole model."""
    return join_rules(
        {
            _VISION: _tower_family(model.vision).rules(model.vision),
            _PROJECTOR: _projector(model).rules,
            _LANGUAGE: decoder_family().rules(model.language),
        }
    )


def unused(model: ModelConfig) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return join_patterns(
        {
            _VISION: _tower_family(model.vision).unused(model.vision),
            _LANGUAGE: decoder_family().unused(model.language),
        }
    )


def constants(model: ModelConfig) -> Mapping[str, Tensor]:
    """Return tensors that a folder must have and our model lacks, with values that have no effect."""
    return prefixed(_VISION, _tower_family(model.vision).constants(model.vision))


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return config.json without the type of the weights and the ids of the tokenizer.

    The exported tower ends with the layer whose output the projection gets, so the feature layer is the last one.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "image_token_index": model.language.image_token_id,
        "image_seq_length": model.fixed_image_tokens("export to LLaVA"),
        "projector_hidden_act": _projector(model).activation,
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": select_strategy(_tower(model)),
        "pad_token_id": model.language.pad_token_id,
        "tie_word_embeddings": model.language.share_embeddings_and_output_weights,
        "text_config": decoder_family().config_to_hf(model.language),
        "vision_config": _tower_family(model.vision).config_to_hf(model.vision),
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> ModelConfig:
    """Return our settings.

    The rows of image and padding in the folder may stand anywhere: no text has their ids, nothing is computed from
    them, and the model gets its own behind the tokenizer's.

    Args:
        settings: config.json of a LlavaForConditionalGeneration.
        where: the file, for messages.
        chosen: fields that override the file, and `vocab_size`, the tokens of the tokenizer; without it, all ids below
            the image's.

    Raises:
        CheckpointError: our model does not support something in the settings.
    """
    feature_layer = settings.get("vision_feature_layer", -2)
    if not isinstance(feature_layer, int) or feature_layer >= 0:
        raise CheckpointError(
            f"vision_feature_layer={feature_layer}", where=where, fix="use a model with one layer counted from the end"
        )
    # transformers' LlavaConfig omits values that equal its defaults.
    text = {"model_type": "llama", "tie_word_embeddings": settings.get("tie_word_embeddings", False)}
    text |= settings.get("text_config", {})
    vision = _vision_settings(settings)
    language_family = find_family(text["model_type"], "language", f"text_config of {where}")
    vision_family = find_family(vision["model_type"], "vision", f"vision_config of {where}")
    image = settings.get("image_token_index", 32000)
    vocab_size = chosen.pop("vocab_size", None) or image
    if image > vocab_size:
        raise CheckpointError(
            f"tokenizer has {vocab_size} tokens, the image token is {image}",
            where=where,
            fix="complete the folder with the files of its tokenizer, e.g. added_tokens.json",
        )
    language = language_family.config_from_hf(text, where=where, vocab_size=vocab_size)
    tower = _selecting(
        vision_family.config_from_hf(vision, where=where, feature_layer=feature_layer),
        settings.get("vision_feature_select_strategy", "default"),
        where,
    )
    projection = projector_of(
        settings.get("projector_hidden_act", "gelu"),
        input_size=tower.feature_size,
        output_size=language.hidden_size,
        where=where,
    )
    found = {"language": language, "vision": tower, "projection": projection}
    return ModelConfig(**{**found, **chosen})


def _selecting(vision: TowerConfig, strategy: str, where: str) -> TowerConfig:
    """Return the settings of a tower whose hidden state is cut as `vision_feature_select_strategy` says.

    Raises:
        CheckpointError: transformers' class cannot compute with the tower, or would cut off a patch.
    """
    features = {"drop_class_token": strategy == "default", "post_norm": False}
    chosen = {name: value for name, value in features.items() if hasattr(vision, name)}
    vision = replace(vision, **chosen)  # type: ignore[type-var]  # every tower is a dataclass
    _tower_family(vision)
    if strategy == "default" and "drop_class_token" not in chosen:
        raise CheckpointError(
            "vision_feature_select_strategy=default cuts off a patch: the tower has no class token",
            where=where,
            fix="use a model with full",
        )
    return vision


def write_settings(folder: Path, serving: Serving) -> None:
    """Write all files except the weights: config.json, tokenizer, processor, chat template, model card."""
    added = write_language_files(folder, serving)
    write_processor(folder, _tower(serving.model), serving.image_aspect, added.image)
    write_json(folder / CONFIG_NAME, _whole_config(serving))
    write_card(folder, serving, _CARD)


def _whole_config(serving: Serving) -> dict[str, Any]:
    config = config_to_hf(serving.model)
    dtype = str(serving.dtype).removeprefix("torch.")
    ids = {"bos_token_id": serving.tokenizer.bos_id, "eos_token_id": serving.tokenizer.eos_id}
    config["text_config"] = {**config["text_config"], **ids, "dtype": dtype}
    config["vision_config"] = {**config["vision_config"], "dtype": dtype}
    return {"architectures": config["architectures"], "model_type": config["model_type"], "dtype": dtype, **config}
