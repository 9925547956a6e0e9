import pytest
import torch

from megatron_vlm.convert.rules import (
    GatedMLP,
    LinearAsMLP,
    LinearAsPair,
    QueryKeyValue,
    Reshaped,
    Rule,
    Same,
    Vocabulary,
)

QKV = QueryKeyValue(num_attention_heads=4, num_query_groups=2, kv_channels=3)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Same(), (3, 4)),
        (Reshaped((1, 1, 6), (6,)), (1, 1, 6)),
        (QKV, (24, 5)),
        (QKV, (24,)),
        (GatedMLP(), (8, 3)),
        (LinearAsMLP(4, False), (4, 3)),
        (LinearAsMLP(4, True), (4,)),
        (LinearAsPair(3, 8, False), (8, 3)),
        (LinearAsPair(3, 6, True), (6,)),
    ],
)
def test_join_undoes_split(transform, shape):
    whole = torch.randn(shape)
    assert torch.equal(transform.join(transform.split(whole)), whole)


def test_query_key_value_keeps_the_queries_of_a_group_together():
    query = torch.arange(12).view(12, 1)
    key, value = torch.arange(100, 106).view(6, 1), torch.arange(200, 206).view(6, 1)
    rows = QKV.join([query, key, value]).flatten().tolist()
    assert rows == [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202, 6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]


def test_gated_mlp_has_the_gate_first():
    assert GatedMLP().join([torch.zeros(2, 1), torch.ones(2, 1)]).flatten().tolist() == [0, 0, 1, 1]


def test_linear_as_mlp_refuses_a_second_layer_that_changes_something():
    with pytest.raises(ValueError, match="not the identity"):
        LinearAsMLP(2, False).join([torch.ones(2, 3), 2 * torch.eye(2)])


def test_linear_as_relu_pair_computes_what_the_layer_does():
    weight, x = torch.randn(8, 3), torch.randn(5, 3)
    first, second = LinearAsPair(3, 8, False).split(weight)
    torch.testing.assert_close((x @ first.T).relu() @ second.T, x @ weight.T)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("of_bias", [False, True])
def test_linear_as_relu_pair_refuses_layers_that_are_none(changed, of_bias):
    pair = LinearAsPair(3, 8, of_bias)
    theirs = pair.split(torch.randn(8) if of_bias else torch.randn(8, 3))
    theirs[changed][-1] += 1
    if of_bias and changed:
        assert torch.equal(pair.join(theirs), theirs[1])  # any bias of the second layer is that of a linear one
        return
    with pytest.raises(ValueError, match="with a ReLU are not those of a linear one"):
        pair.join(theirs)


def test_rule_names_each_layer():
    rule = Rule("model.x", (2,), ("a.{layer}.b",), num_layers=3)
    assert [rule.names_of(layer) for layer in rule.layers] == [("a.0.b",), ("a.1.b",), ("a.2.b",)]
    assert rule.checkpoint_shape == (3, 2)


def test_rule_knows_their_shapes_without_values():
    assert Rule("model.x", (24, 5), ("q", "k", "v"), QKV).their_shapes() == [(12, 5), (6, 5), (6, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_the_rows_is_that_of_the_whole_table_at_once(dtype):
    rows = torch.randn(1000, 1100).to(dtype)
    ours = Vocabulary(vocab_size=1000, num_token_ids=1003, num_rows=1024, num_their_rows=1000).join([rows])
    assert torch.equal(ours[:1000], rows)
    assert torch.equal(ours[1000:1003], rows.float().mean(0).to(dtype).expand(3, -1))
    assert not ours[1003:].any()
