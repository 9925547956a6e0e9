"""The Llama family: tensor names of LlamaForCausalLM and settings of its config.json."""

from typing import Any

from torch import Tensor

from megatron_vlm.config import CheckpointError, LanguageConfig
from megatron_vlm.convert.rules import GatedMLP, QueryKeyValue, Rule, Vocabulary

PART = "language"
MODEL_TYPES = ("llama", "LlamaForCausalLM", "LLaMAForCausalLM")

_PREFIX = "model.language_model."
_UNUSED = (r".*\.rotary_emb\.inv_freq",)
_EMBEDDING_NAME = "model.embed_tokens.weight"
_OUTPUT_NAME = "lm_head.weight"


def renames(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return no renames: all versions use the names of the table."""
    return ()


def rules(language: LanguageConfig) -> list[Rule]:
    """Return the table."""
    shape = (language.padded_vocab_size, language.hidden_size)
    vocabulary = Vocabulary(
        vocab_size=language.vocab_size,
        num_token_ids=language.num_token_ids,
        num_rows=language.padded_vocab_size,
        num_their_rows=language.num_token_ids,
    )
    hidden, ffn, layers = language.hidden_size, language.ffn_hidden_size, language.num_layers
    heads, groups, channels = language.num_attention_heads, language.query_groups, language.head_channels
    qkv = QueryKeyValue(num_attention_heads=heads, num_query_groups=groups, kv_channels=channels)
    ours, theirs = _PREFIX + "decoder.layers.", "model.layers.{layer}."
    attention, mlp = theirs + "self_attn.", theirs + "mlp."
    rows = (heads + 2 * groups) * channels
    table = [
        Rule(_PREFIX + "embedding.word_embeddings.weight", shape, (_EMBEDDING_NAME,), vocabulary),
        Rule(_PREFIX + "decoder.final_layernorm.weight", (hidden,), ("model.norm.weight",)),
        Rule(
            ours + "self_attention.linear_qkv.weight",
            (rows, hidden),
            (attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"),
            qkv,
            layers,
        ),
        Rule(
            ours + "self_attention.linear_proj.weight",
            (hidden, heads * channels),
            (attention + "o_proj.weight",),
            num_layers=layers,
        ),
        Rule(
            ours + "mlp.linear_fc1.weight",
            (2 * ffn, hidden),
            (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            GatedMLP(),
            layers,
        ),
        Rule(ours + "mlp.linear_fc2.weight", (hidden, ffn), (mlp + "down_proj.weight",), num_layers=layers),
    ]
    for key, name in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    ):
        table.append(Rule(ours + key, (hidden,), (theirs + name,), num_layers=layers))
    if not language.share_embeddings_and_output_weights:
        table.append(Rule(_PREFIX + "output_layer.weight", shape, (_OUTPUT_NAME,), vocabulary))
    return table


def unused(language: LanguageConfig) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return (*_UNUSED, _OUTPUT_NAME) if language.share_embeddings_and_output_weights else _UNUSED


def constants(language: LanguageConfig) -> dict[str, Tensor]:
    """Return nothing: our decoder has every tensor of the format."""
    return {}


def config_to_hf(language: LanguageConfig) -> dict[str, Any]:
    """Return config.json of the decoder, with the spellings of RoPE in both transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": language.num_token_ids,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.query_groups,
        "head_dim": language.head_channels,
        "hidden_act": "silu",
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.layernorm_epsilon,
        "rope_theta": language.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rotary_base},
        "initializer_range": language.init_method_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pad_token_id": language.pad_token_id,
        "tie_word_embeddings": language.share_embeddings_and_output_weights,
        "use_cache": True,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> LanguageConfig:
    """Return our settings.

    Args:
        settings: config.json of a LlamaForCausalLM.
        where: the file, for messages.
        chosen: fields that override the file.

    Raises:
        CheckpointError: our model does not support something in the settings.
    """
    usual_settings = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_interleaved": False}
    for key, usual in usual_settings.items():
        if settings.get(key, usual) != usual:
            raise CheckpointError(
                f"the language model has {key}={settings[key]}", where=where, fix=f"use a model with {key}={usual}"
            )
    found: dict[str, Any] = {
        # The defaults are those of transformers' LlamaConfig; files omit values that equal them.
        "vocab_size": settings.get("vocab_size", 32000),
        "num_layers": settings.get("num_hidden_layers", 32),
        "hidden_size": settings.get("hidden_size", 4096),
        "ffn_hidden_size": settings.get("intermediate_size", 11008),
        "num_attention_heads": settings.get("num_attention_heads", 32),
        "num_query_groups": settings.get("num_key_value_heads"),
        "kv_channels": settings.get("head_dim"),
        "max_position_embeddings": settings.get("max_position_embeddings", 2048),
        "rotary_base": _rotary_base(settings, where),
        "layernorm_epsilon": float(settings.get("rms_norm_eps", 1e-6)),
        "share_embeddings_and_output_weights": bool(settings.get("tie_word_embeddings", False)),
        "init_method_std": float(settings.get("initializer_range", 0.02)),
    }
    return LanguageConfig(**{**found, **chosen})


def _rotary_base(settings: dict[str, Any], where: str) -> float:
    """Return the base of RoPE from `rope_theta` (transformers 4) or `rope_parameters` (5)."""
    parameters = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"the language model scales its rotary positions ({kind})", where=where, fix="use a model that does not"
        )
    base = float(parameters.get("rope_theta", settings.get("rope_theta", 10000.0)))
    if not base.is_integer():
        raise CheckpointError(
            f"the language model has the rotary base {base}", where=where, fix="use a model with an integer base"
        )
    return base
