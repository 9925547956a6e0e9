import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.layers.mlp import FusedMLP, swiglu
from megatron_vlm.models.layers.specs import mlp_submodules


def test_swiglu_and_its_gradient_are_those_of_the_formula():
    x = torch.randn(7, 2, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_swiglu_keeps_only_its_input():
    x = torch.randn(7, 10, requires_grad=True)
    (kept,) = swiglu(x).grad_fn.saved_tensors
    assert kept.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}, id="swiglu"),
        pytest.param({"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": True}, id="with bias"),
        pytest.param({"gated_linear_unit": True, "activation_func": F.gelu, "add_bias_linear": False}, id="geglu"),
        pytest.param({"gated_linear_unit": False, "activation_func": F.gelu, "add_bias_linear": True}, id="gelu"),
        pytest.param(
            {"gated_linear_unit": True, "activation_func": F.silu, "activation_func_clamp_value": 0.1}, id="clamped"
        ),
    ],
)
def test_the_mlp_is_megatron_cores(one_rank, settings):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        **settings,
    )
    ours = FusedMLP.of_group(mlp_submodules(), None)(config)
    theirs = MLP(config, mlp_submodules(), ffn_hidden_size=24)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 16)
    grads = []
    for mlp in (ours, theirs):
        output, bias = mlp(x)
        (output if bias is None else output + bias).square().sum().backward()
        grads.append([parameter.grad for parameter in mlp.parameters()])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(grads[0], grads[1])
