from dataclasses import replace

import pytest
import yaml

from megatron_vlm.config import ConfigError, ModelConfig, config_to_dict, load_section
from megatron_vlm.config.adapters.lora import TARGETS, Config
from megatron_vlm.costs.activations import stage_activations
from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.parameters import stage_sizes
from tests.support.configs import SEQ_LENGTH, tiny_model, tiny_run
from tests.support.lora_runs import lora_model
from tests.support.real_costs import assert_costs_are_real


def test_the_defaults_are_those_of_vila():
    adapter = Config()
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (64, 16.0, 0.05, TARGETS)
    assert adapter.scale == 0.25


def test_settings_are_read_from_yaml(tmp_path):
    adapter = {"type": "lora", "rank": 8, "targets": ["linear_qkv"], "ranks": {"linear_qkv": 24}}
    settings = {"model": {**config_to_dict(tiny_model()), "adapter": adapter}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    model = load_section(ModelConfig, tmp_path / "model.yaml", "model")
    assert model.adapter == Config(rank=8, targets=("linear_qkv",), ranks={"linear_qkv": 24})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "model.adapter.rank=0 is not positive"),
        ({"alpha": 0.0}, "model.adapter.alpha=0.0 is not positive"),
        ({"dropout": -0.1}, "model.adapter.dropout=-0.1 is negative"),
        ({"dropout": 1.0}, "model.adapter.dropout=1.0 leaves nothing"),
        ({"targets": ()}, r"model.adapter.targets=\[\] does not name each target once"),
        ({"targets": ("linear_qkv", "linear_qkv")}, "does not name each target once; fix: choose from linear_qkv"),
        (
            {"ranks": {"linear_fc1": 0}},
            "model.adapter.ranks.linear_fc1=0 is not a rank from 1 to 16384 of one of the targets",
        ),
        (
            {"targets": ("linear_qkv",), "ranks": {"linear_fc1": 2}},
            "is not a rank from 1 to 16384 of one of the targets",
        ),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize("targets", [TARGETS, ("linear_proj", "linear_fc1")])
@pytest.mark.parametrize("freeze", [("vision_model", "language_model"), ()], ids=lambda parts: "+".join(parts))
def test_parameters_and_operations_are_those_of_a_step(one_rank, targets, freeze):
    adapter = Config(rank=4, dropout=0.0, targets=targets, ranks={"linear_proj": 7})
    assert_costs_are_real(tiny_run(model=lora_model(adapter), training={"freeze": freeze}), freeze)


def test_a_rank_of_two_has_half_of_what_is_split():
    # Of column-parallel layers B is split, of the others A.
    language, tp2 = tiny_model().language, {"tensor_model_parallel_size": 2}
    (one,), (two,) = (stage_sizes(tiny_run(model=lora_model(), parallel=parallel)) for parallel in ({}, tp2))
    sizes = {"qkv": (64, 128), "proj": (64, 64), "fc1": (64, 256), "fc2": (128, 64)}
    assert language.layer_matrices() == tuple(sizes.values())
    whole = 4 * (64 + 64 + 64 + 64)
    split = 4 * (128 + 64 + 256 + 128)
    assert one.adapter == 4 * (whole + split)
    assert two.adapter == 4 * (whole + split / 2)


def test_activations_are_the_inputs_of_a_and_their_masks():
    model = replace(tiny_model(), adapter=None)
    settings = {"num_layers": 3, "tensor_parallel_size": 1}
    with_mask, without = (
        Config(rank=4, dropout=dropout, targets=("linear_fc2",)).activations(model, "language_model", 10, 0, **settings)
        for dropout in (0.1, 0.0)
    )
    assert without.kept == 3 * 10 * (128 + 4)
    assert with_mask.kept == without.kept + 3 * 10 * 64


@pytest.mark.parametrize(("recompute", "kept", "working"), [("none", 4, 0), ("full", 0, 1)])
def test_a_recomputed_layer_holds_its_pairs_while_it_is_computed(recompute, kept, working):
    work = Work(num_tokens=0, attention_pairs=0, num_labels=8, num_images=0)
    adapter = Config(rank=4, dropout=0.0, targets=("linear_fc2",))
    frozen = {"freeze": ("language_model.decoder.final_layernorm",), "recompute": recompute}
    adapted, plain = (
        stage_activations(tiny_run(model=model, training=frozen), 0, work, "torch")
        for model in (lora_model(adapter), tiny_model())
    )
    of_a_layer = SEQ_LENGTH * (128 + 4)
    assert (adapted.kept - plain.kept, adapted.working - plain.working) == (kept * of_a_layer, working * of_a_layer)
