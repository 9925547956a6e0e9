import dataclasses

import pytest

from megatron_vlm.costs.memory import estimate_memory, stage_sizes
from tests.support.configs import tiny_model, tiny_run


def run_of(tp=1, pp=1, dp=1, model=None, training=None, **parallel):
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel}
    return tiny_run(parallel=layout, model=model, training={"global_batch_size": 4 * dp, **(training or {})})


def counted(state):
    """Return the parameters that a rank really holds, by part."""
    totals = {}
    for chunk in state.chunks:
        for name, parameter in chunk.named_parameters():
            part = name.split(".")[0]
            totals[part] = totals.get(part, 0) + parameter.numel()
    return totals


@pytest.mark.parametrize(
    ("tp", "pp", "first", "changes"),
    [
        (1, 1, None, {}),
        (2, 1, None, {}),
        (4, 1, None, {"num_query_groups": 4}),
        (1, 2, None, {}),
        (2, 2, None, {}),
        (2, 4, None, {}),
        (1, 2, 1, {}),
        (1, 1, None, {"share_embeddings_and_output_weights": True}),
        (2, 2, None, {"share_embeddings_and_output_weights": True}),
        (1, 1, None, {"kv_channels": 24}),
    ],
)
def test_parameters_are_those_that_each_rank_builds(tp, pp, first, changes, play, tmp_path):
    config = run_of(tp, pp, model=tiny_model(**changes), num_layers_in_first_pipeline_stage=first)
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    for rank in range(tp * pp):
        state = play(config, rank, tp * pp, step=False)
        size = stage_sizes(config)[state.rank.pp_rank]
        expected = {name: getattr(size, name) for name in ("vision_model", "vision_projection", "language_model")}
        assert counted(state) == {name: value for name, value in expected.items() if value}


@pytest.mark.parametrize("changes", [{"class_token": False}, {"pre_norm": False}, {"feature_layer": -1}])
def test_parameters_of_other_towers_are_right_too(changes, play, tmp_path):
    model = tiny_model()
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, **changes))
    config = dataclasses.replace(run_of(model=model), run_dir=str(tmp_path))
    assert counted(play(config, 0, 1, step=False))["vision_model"] == stage_sizes(config)[0].vision_model


def test_parameters_of_a_linear_projection_are_right_too(play, tmp_path):
    model = tiny_model()
    model = dataclasses.replace(model, projection=dataclasses.replace(model.projection, type="linear"))
    config = dataclasses.replace(run_of(model=model), run_dir=str(tmp_path))
    assert counted(play(config, 0, 1, step=False))["vision_projection"] == stage_sizes(config)[0].vision_projection


def test_frozen_parts_do_not_learn():
    size = stage_sizes(run_of())[0]
    assert size.learning(("vision_model", "language_model")) == size.vision_projection


def test_distributed_optimizer_shares_its_state_among_data_parallel_ranks():
    memory = [estimate_memory(run_of(dp=dp), 0, dp) for dp in (1, 4)]
    assert memory[0].optimizer == 4 * memory[1].optimizer
    assert memory[0].gradients == memory[1].gradients


def test_plain_optimizer_keeps_its_whole_state():
    memory = [estimate_memory(run_of(dp=dp, use_distributed_optimizer=False), 0, dp) for dp in (1, 4)]
    assert memory[0].optimizer == memory[1].optimizer


def test_weights_in_bf16_take_half_and_their_optimizer_half_as_much_again():
    full, half = (estimate_memory(run_of(training={"precision": name}), 0, 1) for name in ("fp32", "bf16"))
    assert full.weights == 2 * half.weights
    assert 3 * full.optimizer == 2 * half.optimizer


def test_frozen_decoder_has_neither_gradients_nor_optimizer():
    frozen = estimate_memory(run_of(training={"freeze": ("vision_model", "language_model")}), 0, 1)
    assert frozen.gradients == 4 * stage_sizes(run_of())[0].vision_projection


def test_first_stage_keeps_the_activations_of_the_most_micro_batches():
    first, last = (estimate_memory(run_of(pp=4), stage, 1).activations for stage in (0, 3))
    assert first == 4 * last


def test_recomputation_and_sequence_parallelism_keep_less():
    plain = estimate_memory(run_of(tp=2), 0, 1).activations
    split = estimate_memory(run_of(tp=2, sequence_parallel=True), 0, 1).activations
    recomputed = estimate_memory(run_of(tp=2, training={"recompute": "full"}), 0, 1).activations
    assert recomputed < split < plain


def test_total_is_the_sum_of_its_kinds():
    memory = estimate_memory(run_of(), 0, 1)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations
