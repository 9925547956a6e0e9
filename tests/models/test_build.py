import dataclasses
import itertools

import pytest
import torch

from megatron_vlm.config import PART_NAMES, ConfigError, ParallelConfig
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model

FREEZES = [freeze for count in range(4) for freeze in itertools.combinations(PART_NAMES, count)]


@pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: "+".join(freeze) or "nothing")
def test_the_named_parts_rest_and_no_other_does(freeze, one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation(), freeze)
    for name, parameter in chunk.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in freeze), name


def test_every_parameter_is_in_one_of_the_three_parts(one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation())
    assert {name.split(".")[0] for name, _ in chunk.named_parameters()} == set(PART_NAMES)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_all_weights_have_the_precision_of_the_computation(precision, dtype, one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation(precision=precision))
    assert {parameter.dtype for parameter in chunk.parameters()} == {dtype}


def test_tensors_have_the_names_that_checkpoints_have(one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation())
    names = {
        name.replace(".layers.0.", ".layers.N.").replace(".layers.1.", ".layers.N.") for name in chunk.state_dict()
    }
    names = {name for name in names if not name.endswith("_extra_state") and ".layers." not in name}
    assert names == {
        "vision_model.class_token",
        "vision_model.conv1.weight",
        "vision_model.position_embeddings.weight",
        "vision_model.ln_pre.weight",
        "vision_model.ln_pre.bias",
        "vision_projection.encoder.linear_fc1.weight",
        "vision_projection.encoder.linear_fc1.bias",
        "vision_projection.encoder.linear_fc2.weight",
        "vision_projection.encoder.linear_fc2.bias",
        "language_model.embedding.word_embeddings.weight",
        "language_model.decoder.final_layernorm.weight",
        "language_model.output_layer.weight",
    }


class Unbuilt(ClipConfig):
    """Settings of a tower that no module of models/towers builds."""

    __slots__ = ()
    type = "drawn_by_hand"


def test_a_type_that_nothing_builds_is_refused(one_rank):
    model = tiny_model()
    fields = {field.name: getattr(model.vision, field.name) for field in dataclasses.fields(model.vision)}
    del fields["type"]
    tower = object.__new__(Unbuilt)
    for name, value in fields.items():
        object.__setattr__(tower, name, value)
    with pytest.raises(ConfigError, match=r"unknown model.vision.type 'drawn_by_hand'; fix: choose one of clip"):
        build_model(dataclasses.replace(model, vision=tower), ParallelConfig(), Computation())
