from megatron_vlm.config.parameter_sizes import linear_sizes, norm_sizes, prefixed


def test_a_linear_layer_and_a_norm_may_have_a_bias():
    assert linear_sizes(3, 5) == {"weight": 15, "bias": 5}
    assert linear_sizes(3, 5, bias=False) == {"weight": 15}
    assert norm_sizes(4) == {"weight": 4, "bias": 4}
    assert norm_sizes(4, bias=False) == {"weight": 4}


def test_a_prefix_stands_before_a_dot():
    assert prefixed("part.layer", {"weight": 1}) == {"part.layer.weight": 1}
