"""The LLaVA family of transformers: a CLIP tower, a projector of two layers and a Llama decoder in one folder."""

from dataclasses import replace
from typing import Any

from megatron_vlm.config import CheckpointError, ModelConfig, ProjectorConfig
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.families import clip, llama
from megatron_vlm.convert.rules import LinearAsMLP, Rule

KEY_PREFIX = "model.vision_projection.encoder."
LANGUAGE_PREFIX, VISION_PREFIX, PROJECTOR_PREFIX = "language_model.", "vision_tower.", "multi_modal_projector."
RENAMES = (
    (r"(model\.)?language_model\.model\.", "language_model.model."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
)
"""The table has the names of transformers 4; 5 drops `vision_model.`, and models in memory start with `model.`."""
POST_NORM = VISION_PREFIX + clip.POST_NORM

_PROJECTOR_ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of the whole model; their embedding has our `padded_vocab_size` rows."""
    return [
        *(prefixed(rule, VISION_PREFIX) for rule in clip.rules(clip.tower_of(model))),
        *_projection_rules(model),
        *(
            prefixed(rule, LANGUAGE_PREFIX)
            for rule in llama.rules(model.language, vocab_rows=model.language.padded_vocab_size)
        ),
    ]


def unused(model: ModelConfig) -> tuple[str, ...]:
    """Return regular expressions of tensors that a file may hold beside those of the table."""
    return (
        *(rf"vision_tower\.{pattern}" for pattern in clip.unused(clip.tower_of(model))),
        *(rf"language_model\.{pattern}" for pattern in llama.unused(model.language)),
    )


def prefixed(rule: Rule, prefix: str) -> Rule:
    """Return the rule with `prefix` before their names."""
    return replace(rule, names=tuple(prefix + name for name in rule.names))


def _projection_rules(model: ModelConfig) -> list[Rule]:
    hidden, features = model.language.hidden_size, model.vision.feature_size
    first, second = PROJECTOR_PREFIX + "linear_1.", PROJECTOR_PREFIX + "linear_2."
    if model.projection.type == "linear":
        # LLaVA has two layers; the second one of a linear projection is written as the identity.
        return [
            Rule(
                KEY_PREFIX + "weight", (hidden, features), (first + "weight", second + "weight"), _linear(model, False)
            ),
            Rule(KEY_PREFIX + "bias", (hidden,), (first + "bias", second + "bias"), _linear(model, True)),
        ]
    return [
        Rule(KEY_PREFIX + "linear_fc1.weight", (hidden, features), (first + "weight",)),
        Rule(KEY_PREFIX + "linear_fc1.bias", (hidden,), (first + "bias",)),
        Rule(KEY_PREFIX + "linear_fc2.weight", (hidden, hidden), (second + "weight",)),
        Rule(KEY_PREFIX + "linear_fc2.bias", (hidden,), (second + "bias",)),
    ]


def _linear(model: ModelConfig, of_bias: bool) -> LinearAsMLP:
    return LinearAsMLP(model.language.hidden_size, of_bias)


def config_to_hf(model: ModelConfig, *, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """Return config.json.

    The tower ends with the layer whose output is handed on, so the feature layer is the last one.

    Args:
        model: sizes of the three parts.
        bos_id: id of the token that a sample starts with.
        eos_id: id of the token that an answer ends with.
        dtype: of the weights, e.g. "bfloat16".
    """
    tokens = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": model.language.image_token_id,
        "image_seq_length": model.fixed_image_tokens("export to LLaVA"),
        "projector_hidden_act": _PROJECTOR_ACTIVATIONS[model.projection.type],
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "pad_token_id": model.language.pad_token_id,
        "tie_word_embeddings": model.language.share_embeddings_and_output_weights,
        "text_config": {**llama.config_to_hf(model.language), **tokens, "dtype": dtype},
        "vision_config": {**clip.config_to_hf(clip.tower_of(model)), "dtype": dtype},
    }


def config_from_hf(settings: dict[str, Any], *, where: str) -> ModelConfig:
    """Return our settings.

    Args:
        settings: config.json of a LlavaForConditionalGeneration.
        where: the file, for messages.

    Raises:
        CheckpointError: the model has a part that ours has not.
    """
    kinds = (settings["text_config"].get("model_type"), settings["vision_config"].get("model_type"))
    if kinds != ("llama", "clip_vision_model"):
        raise CheckpointError(
            f"a LLaVA of {kinds[0]} and {kinds[1]}", where=where, fix="use one of llama and clip_vision_model"
        )
    if settings.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError("the class token is handed on as an image token", where=where, fix="use another model")
    feature_layer = settings.get("vision_feature_layer", -2)
    if not isinstance(feature_layer, int) or feature_layer >= 0:
        raise CheckpointError(
            f"vision_feature_layer={feature_layer}", where=where, fix="use a model with one layer counted from the end"
        )
    # transformers' LlavaConfig leaves out what equals its default.
    text = {**settings["text_config"]}
    text.setdefault("tie_word_embeddings", settings.get("tie_word_embeddings", False))
    language = llama.config_from_hf(text, vocab_size=settings.get("image_token_index", 32000), where=where)
    rows = text.get("vocab_size", 32000)
    if rows != language.padded_vocab_size:
        raise CheckpointError(
            f"{rows} rows in the vocabulary with the image token {language.image_token_id}, not "
            f"{language.padded_vocab_size}",
            where=where,
            fix="use a model whose added tokens are image, then padding, padded to a multiple of 64",
        )
    return ModelConfig(
        language=language,
        vision=clip.config_from_hf(settings["vision_config"], feature_layer=feature_layer, where=where),
        projection=_projection_from_hf(settings.get("projector_hidden_act", "gelu"), where),
    )


def _projection_from_hf(activation: str, where: str) -> ProjectorConfig:
    for ours, theirs in _PROJECTOR_ACTIVATIONS.items():
        if theirs == activation:
            return make_projector(ours)
    raise CheckpointError(
        f"projector_hidden_act={activation}", where=where, fix=f"use {', '.join(_PROJECTOR_ACTIVATIONS.values())}"
    )
