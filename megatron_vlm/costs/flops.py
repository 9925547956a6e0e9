"""Floating-point operations that a step has to do: real patches and real samples, no padding, no recomputation.

A multiplication and an addition count as two; the backward pass costs twice the forward pass.
"""

from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig


def language_flops(language: LanguageConfig, num_tokens: int, attention_pairs: int, num_labels: int) -> float:
    """Return the forward operations of the decoder.

    Args:
        language: sizes.
        num_tokens: positions that hold something.
        attention_pairs: query-key pairs that causal attention inside the samples looks at.
        num_labels: positions whose logits are computed.
    """
    hidden, channels = language.hidden_size, language.head_channels
    query, key_value = language.num_attention_heads * channels, language.query_groups * channels
    weights = hidden * (2 * query + 2 * key_value) + 3 * hidden * language.ffn_hidden_size
    per_layer = 2 * num_tokens * weights + 4 * attention_pairs * query
    return language.num_layers * per_layer + 2 * num_labels * hidden * language.padded_vocab_size


def vision_flops(vision: VisionConfig, num_images: int) -> float:
    """Return the forward operations of the tower on `num_images` images."""
    hidden, tokens = vision.hidden_size, vision.num_patches + int(vision.class_token)
    weights = 4 * hidden * hidden + 2 * hidden * vision.ffn_hidden_size
    per_layer = 2 * tokens * weights + 4 * tokens * tokens * hidden
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * hidden
    return num_images * (vision.num_layers_run * per_layer + patches)


def projection_flops(model: ModelConfig, num_images: int) -> float:
    """Return the forward operations of the projection on `num_images` images."""
    inside, outside = model.vision.hidden_size, model.language.hidden_size
    weights = inside * outside + (outside * outside if model.projection.type == "mlp2x_gelu" else 0)
    return 2 * num_images * model.vision.num_patches * weights


def step_flops(
    model: ModelConfig,
    freeze: tuple[str, ...],
    *,
    num_tokens: int,
    attention_pairs: int,
    num_labels: int,
    num_images: int,
) -> float:
    """Return the operations of one optimizer step: forward, and what of the backward pass the frozen parts leave.

    A frozen decoder still hands gradients to the images, which costs as much as one forward pass; a frozen tower costs
    its forward pass alone.
    """
    language = language_flops(model.language, num_tokens, attention_pairs, num_labels)
    vision, projection = vision_flops(model.vision, num_images), projection_flops(model, num_images)
    language_factor = 2 if "language_model" in freeze else 3
    vision_factor = 1 if "vision_model" in freeze else 3
    projection_factor = 1 if "vision_projection" in freeze and "vision_model" in freeze else 3
    return language_factor * language + vision_factor * vision + projection_factor * projection
