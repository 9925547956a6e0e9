import pytest

from megatron_vlm.config.patterns import matches_any, parameter_sizes
from megatron_vlm.models.parameter_names import _unfused, global_parameters
from tests.support.configs import tiny_model, tiny_run

PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "pp2": PIPELINE,
    "first_stage_of_one_layer": {**PIPELINE, "num_layers_in_first_pipeline_stage": 1},
    "vpp2": {**PIPELINE, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True},
    "tp2_pp2": {**PIPELINE, "tensor_model_parallel_size": 2},
}
FREEZE = ("vision_model", "language_model.embedding", "language_model.decoder.layers.[12].*")


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_all_stages_together_have_the_names_of_the_whole_model(parallel, tied, play, tmp_path):
    model = tiny_model(share_embeddings_and_output_weights=tied)
    config = tiny_run(str(tmp_path), parallel=parallel, model=model, training={"freeze": FREEZE})
    tp = parallel.get("tensor_model_parallel_size", 1)
    learns = {}
    for rank in range(0, 2 * tp, tp):
        for chunk in play(config, rank, 2 * tp, step=False).chunks:
            for name, parameter in global_parameters(chunk):
                assert learns.setdefault(name, parameter.requires_grad) == parameter.requires_grad
    assert learns == {name: not matches_any(FREEZE, name) for name in parameter_sizes(model)}


def test_norms_in_fused_modules_have_the_names_of_norms():
    assert _unfused("self_attention.linear_qkv.layer_norm_weight") == "input_layernorm.weight"
    assert _unfused("mlp.linear_fc1.layer_norm_weight") == "pre_mlp_layernorm.weight"
    assert _unfused("mlp.linear_fc1.weight") == "mlp.linear_fc1.weight"
