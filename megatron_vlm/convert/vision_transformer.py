"""The table of tensors of a vision transformer, from the names that another format gives them."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.vision_transformer import Activation, VisionTransformerConfig
from megatron_vlm.convert.rules import FusedQueryKeyValue, QueryKeyValue, Reshaped, Rule, Same

_PREFIX = "model.vision_model."
_LAYERS = _PREFIX + "decoder.layers."
Shapes = dict[str, tuple[int, ...]]
"""Axes after the first one, of weight and bias."""
ACTIVATIONS: dict[Activation, str] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}
"""Our names of activations, and those in `hidden_act` of config.json."""
FREE = frozenset({"init_method_std", "feature_layer", "drop_class_token"})
"""Fields of every tower that a training may choose freely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of the tensors in another format, those of linear layers and norms without `weight` and `bias`.

    A name that a tower does not need is empty.
    """

    patches: str
    positions: str
    """A parameter float[1, tokens, h], or an embedding float[tokens, h] if the name ends with `.weight`."""
    class_token: str = ""
    class_token_shape: tuple[int, ...] = (1, 1)
    """Its axes before the channels."""
    registers: str = ""
    pre_norm: str = ""
    post_norm: str = ""
    layer: str
    """Prefix of the names below, with `{layer}` for the index of the layer."""
    attention_norm: str
    qkv: tuple[str, ...]
    """Query, key and value, or one for all three."""
    query_norm: str = ""
    key_norm: str = ""
    proj: str
    attention_scale: str = ""
    mlp_norm: str
    fc1: str
    fc2: str
    mlp_scale: str = ""


def vision_rules(vision: VisionTransformerConfig, names: Names) -> list[Rule]:
    """Return the table, which has only the layers that run."""
    hidden, special, patch = vision.hidden_size, vision.architecture, vision.patch_size
    table = []
    if special.class_token:
        shape = (*names.class_token_shape, hidden)
        table.append(
            Rule(_PREFIX + "class_token", (1, 1, hidden), (names.class_token,), Reshaped((1, 1, hidden), shape))
        )
    if special.num_registers:
        table.append(Rule(_PREFIX + "registers", (1, special.num_registers, hidden), (names.registers,)))
    table.append(Rule(_PREFIX + "conv1.weight", (hidden, 3, patch, patch), (names.patches + "weight",)))
    if special.patch_bias:
        table.append(Rule(_PREFIX + "conv1.bias", (hidden,), (names.patches + "bias",)))
    positions = (vision.position_grid**2 + int(special.class_token), hidden)
    same = Same() if names.positions.endswith(".weight") else Reshaped(positions, (1, *positions))
    table.append(Rule(_PREFIX + "position_embeddings.weight", positions, (names.positions,), same))
    kinds = ("weight", "bias") if special.normalization == "LayerNorm" else ("weight",)
    for there, key, name in (
        (special.pre_norm, "ln_pre.", names.pre_norm),
        (special.post_norm, "ln_post.", names.post_norm),
    ):
        if there:
            table += [Rule(_PREFIX + key + kind, (hidden,), (name + kind,)) for kind in kinds]
    return table + _layer_rules(vision, names)


def _layer_rules(vision: VisionTransformerConfig, names: Names) -> list[Rule]:
    hidden, ffn, special = vision.hidden_size, vision.ffn_hidden_size, vision.architecture
    fc1 = ffn * (2 if special.activation == "swiglu" else 1)
    qkv = QueryKeyValue.of_heads(hidden, vision.num_attention_heads)
    fuse = qkv if len(names.qkv) == 3 else FusedQueryKeyValue(qkv)
    vector: Shapes = {"weight": ()}
    both: Shapes = {"weight": (), "bias": ()}
    columns: Shapes = {"weight": (hidden,), "bias": ()}
    norm = both if special.normalization == "LayerNorm" else vector
    qkv_columns: Shapes = columns if special.add_qkv_bias else {"weight": (hidden,)}
    rows: list[tuple[str, int, Shapes, tuple[str, ...]]] = [
        ("self_attention.linear_qkv.layer_norm_", hidden, norm, (names.attention_norm,)),
        ("self_attention.linear_qkv.", 3 * hidden, qkv_columns, names.qkv),
        ("self_attention.linear_proj.", hidden, columns, (names.proj,)),
        ("mlp.linear_fc1.layer_norm_", hidden, norm, (names.mlp_norm,)),
        ("mlp.linear_fc1.", fc1, columns, (names.fc1,)),
        ("mlp.linear_fc2.", hidden, {"weight": (ffn,), "bias": ()}, (names.fc2,)),
    ]
    if special.qk_layernorm:
        rows.append(("self_attention.q_layernorm.", hidden, vector, (names.query_norm,)))
        rows.append(("self_attention.k_layernorm.", hidden, vector, (names.key_norm,)))
    table = [
        Rule(
            _LAYERS + key + kind,
            (size, *more),
            tuple(names.layer + name + kind for name in theirs),
            fuse if theirs is names.qkv else Same(),
            vision.num_layers_run,
        )
        for key, size, kinds, theirs in rows
        for kind, more in kinds.items()
    ]
    if special.layer_scale is not None:
        for key, name in (("self_attn_bda.weight", names.attention_scale), ("mlp_bda.weight", names.mlp_scale)):
            table.append(Rule(_LAYERS + key, (hidden,), (names.layer + name,), num_layers=vision.num_layers_run))
    return table


def unused_layers(vision: VisionTransformerConfig, names: Names) -> tuple[str, ...]:
    """Return regular expressions for the tensors of layers that do not run."""
    prefix = names.layer.replace(".", r"\.")
    beyond = range(vision.num_layers_run, vision.num_layers)
    return tuple(prefix.replace("{layer}", str(layer)) + ".*" for layer in beyond)


def read_activation(settings: dict[str, Any], *supported: Activation, where: str) -> Any:
    """Return our name of `hidden_act`; without it, the first of those that the tower supports.

    Raises:
        CheckpointError: the tower has another one.
    """
    ours = {ACTIVATIONS[name]: name for name in supported}
    found = settings.get("hidden_act", ACTIVATIONS[supported[0]])
    if found not in ours:
        raise CheckpointError(f"the tower has hidden_act={found}", where=where, fix=f"use one of {', '.join(ours)}")
    return ours[found]


def require_settings(settings: dict[str, Any], wanted: dict[str, Any], *, where: str) -> None:
    """Check settings of which our tower supports one value, which is also the one of a file that omits them.

    Raises:
        CheckpointError: a setting has another value.
    """
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"the tower has {name}={settings[name]}", where=where, fix=f"use one with {value}")


def side_of(size: Any, where: str) -> int:
    """Return the side of a square, which a file may give once or twice.

    Raises:
        CheckpointError: it is no square.
    """
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"images or patches of {size} are no squares", where=where, fix="use another tower")
    side: int = sides.pop()
    return side
