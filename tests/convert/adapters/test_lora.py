"""LoRA merged into the weights of its base computes what it computes beside them."""

from dataclasses import replace

import pytest
import torch

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.config import CheckpointError
from megatron_vlm.config.adapters.lora import TARGETS, Config
from megatron_vlm.convert.adapters.lora import merge, weight_key
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.convert.verify import verify_models
from tests.support.llava_logits import our_logits
from tests.support.random_run import write_random_adapter
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
ADAPTERS = {
    "all": Config(rank=4, alpha=6.0),
    "some": Config(rank=3, alpha=5.0, targets=("linear_fc1", "linear_proj"), ranks={"linear_fc1": 6}),
}


@pytest.fixture
def adapted(make_run, model_config, tokenizer_path, tmp_path):
    """Return a run with random weights of an adapter: adapted(adapter)."""

    def make(adapter):
        model = replace(model_config, adapter=adapter)
        write_random_adapter(tmp_path / "adapted", make_run(model_config), model, tokenizer_path)
        return tmp_path / "adapted"

    return make


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_merged_model_has_the_logits_of_the_adapted_one(adapted, make_run, model_config, tmp_path, adapter):
    run = adapted(ADAPTERS[adapter])
    export_model(read_run_settings(run), tmp_path / "merged")
    verify_models(run, tmp_path / "merged").check(run, tmp_path / "merged")
    import_model(tmp_path / "merged", tmp_path / "back")
    *_, unmerged = our_logits(run)
    *_, merged = our_logits(tmp_path / "back")
    *_, base = our_logits(make_run(model_config))
    # float32: W x + B A x and (W + B A) x add up in another order.
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5 * float(unmerged.abs().max()))
    assert (unmerged - base).abs().max() > 0.1


def test_a_merge_in_half_precision_is_rounded_once(adapted, tmp_path):
    settings = read_run_settings(adapted(ADAPTERS["all"]))
    export_model(settings, tmp_path / "whole")
    export_model(settings, tmp_path / "half", ExportOptions(dtype="bfloat16"))
    for name in ("whole", "half"):
        import_model(tmp_path / name, tmp_path / f"{name}_run")
    from safetensors.torch import load_file

    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)


def test_other_tensors_stay_as_they_are():
    weight = torch.randn(3, 3)
    adapter = Config(targets=("linear_fc2",))
    for key in ("model.language_model.decoder.final_layernorm.weight", weight_key("linear_qkv")):
        assert merge(adapter, key, weight, read=None) is weight
    assert len({weight_key(target) for target in TARGETS}) == 4


def test_a_checkpoint_with_other_pairs_than_its_settings_is_refused(adapted, tmp_path):
    settings = read_run_settings(adapted(ADAPTERS["all"]))
    wrong = replace(settings, model=replace(settings.model, adapter=ADAPTERS["some"]))
    with pytest.raises(CheckpointError, match=r"differ: 4 unexpected: .*lora.*of another shape"):
        export_model(wrong, tmp_path / "merged")


def test_an_adapter_that_cannot_be_merged_is_named(adapted, toy_parts, tmp_path):
    from megatron_vlm.config.adapters.beside_mlp import Config as BesideMLP

    settings = read_run_settings(adapted(ADAPTERS["all"]))
    toy = replace(settings, model=replace(settings.model, adapter=BesideMLP(rank=2)))
    with pytest.raises(CheckpointError, match="adapter beside_mlp cannot be merged .* keep its checkpoint"):
        export_model(toy, tmp_path / "merged")


def test_the_hash_is_that_of_the_whole_adapted_model(adapted, make_run, model_config):
    run = adapted(ADAPTERS["all"])
    assert hash_weights(read_run_settings(run).checkpoint) != hash_weights(
        read_run_settings(make_run(model_config)).checkpoint
    )
