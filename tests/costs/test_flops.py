import pytest

from megatron_vlm.config import ProjectionConfig
from megatron_vlm.costs.flops import language_flops, projection_flops, step_flops, vision_flops
from tests.support.configs import tiny_model


def test_decoder_operations_equal_those_counted_by_hand():
    # hidden 64, 4 heads of 16, 2 groups, ffn 128, 4 layers, vocabulary of 128
    language = tiny_model().language
    weights = 64 * 64 + 64 * 2 * 32 + 64 * 64 + 3 * 64 * 128
    expected = 4 * (2 * 10 * weights + 2 * 2 * 55 * 64) + 2 * 7 * 64 * 128
    assert language_flops(language, num_tokens=10, attention_pairs=55, num_labels=7) == expected


def test_tower_operations_equal_those_counted_by_hand():
    # 16 patches and a class token, hidden 36, ffn 72, two of three layers run, patches of 8 x 8
    vision = tiny_model().vision
    layer = 2 * 17 * (4 * 36 * 36 + 2 * 36 * 72) + 2 * 2 * 17 * 17 * 36
    assert vision_flops(vision, 3) == 3 * (2 * layer + 2 * 16 * 3 * 64 * 36)


def test_a_linear_projection_does_less_than_an_mlp():
    import dataclasses

    model = tiny_model()
    linear = dataclasses.replace(model, projection=ProjectionConfig(type="linear"))
    assert projection_flops(linear, 1) == 2 * 16 * 36 * 64
    assert projection_flops(model, 1) == 2 * 16 * (36 * 64 + 64 * 64)


def test_padding_costs_nothing_and_images_do():
    counts = {"num_tokens": 10, "attention_pairs": 55, "num_labels": 5}
    model = tiny_model()
    without = step_flops(model, (), **counts, num_images=0)
    assert without == 3 * language_flops(model.language, **counts)
    assert step_flops(model, (), **counts, num_images=2) > without


def test_frozen_parts_cost_less():
    counts = {"num_tokens": 10, "attention_pairs": 55, "num_labels": 5, "num_images": 1}
    model = tiny_model()
    whole = step_flops(model, (), **counts)
    tower = vision_flops(model.vision, 1)
    assert step_flops(model, ("vision_model",), **counts) == pytest.approx(whole - 2 * tower)
