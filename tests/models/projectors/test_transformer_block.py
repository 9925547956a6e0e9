import torch.nn.functional as F

from megatron_vlm.config.grid import Grid
from tests.support.projectors import assert_same, build

HEADS = 3


def reference(weights, features):
    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = linear("linear_in.encoder", features)
    for layer in ("decoder.layers.0", "decoder.layers.1"):
        # Query, key and value of a head follow each other.
        qkv = linear(f"{layer}.self_attention.linear_qkv", norm(f"{layer}.input_layernorm", x))
        q, k, v = qkv.unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / q.size(-1) ** 0.5
        attended = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.self_attention.linear_proj", attended)
        inside = linear(f"{layer}.mlp.linear_fc1", norm(f"{layer}.pre_mlp_layernorm", x))
        x = x + linear(f"{layer}.mlp.linear_fc2", F.gelu(inside))
    return linear("linear_out.encoder", norm("norm", x))


def test_it_is_pre_norm_layers_without_a_mask_between_two_products(one_rank):
    patches = Grid(3, 4, 1)
    assert_same(build("transformer_block", patches), reference, patches)
