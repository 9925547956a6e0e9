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
    "layout": {**PIPELINE, "pipeline_model_parallel_layout": "Et*3|tL"},
    "stages_without_a_layer": {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "E|t*4|L"},
    "vpp2_layout": {**PIPELINE, "pipeline_model_parallel_layout": "E|t*2||t*2L", "overlap_p2p_comm": True},
}
FREEZE = ("vision_model", "language_model.embedding", "language_model.decoder.layers.[12].*")


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_all_stages_together_have_the_names_of_the_whole_model(parallel, tied, play, tmp_path):
    model = tiny_model(share_embeddings_and_output_weights=tied)
    config = tiny_run(str(tmp_path), parallel=parallel, model=model, training={"freeze": FREEZE})
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    learns = {}
    for rank in range(0, pp * tp, tp):
        chunks = play(config, rank, pp * tp, step=False).chunks
        placed = config.parallel.chunk_layers(4)[rank // tp]
        assert [[layer.layer_number - 1 for layer in chunk.language_model.decoder.layers] for chunk in chunks] == [
            list(layers) for layers in placed
        ]
        for chunk in chunks:
            for name, parameter in global_parameters(chunk):
                assert learns.setdefault(name, parameter.requires_grad) == parameter.requires_grad
    assert learns == {name: not matches_any(FREEZE, name) for name in parameter_sizes(model)}


def test_norms_in_fused_modules_have_the_names_of_norms():
    assert _unfused("self_attention.linear_qkv.layer_norm_weight") == "input_layernorm.weight"
    assert _unfused("mlp.linear_fc1.layer_norm_weight") == "pre_mlp_layernorm.weight"
    assert _unfused("mlp.linear_fc1.weight") == "mlp.linear_fc1.weight"
