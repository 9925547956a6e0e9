import dataclasses

import pytest

from megatron_vlm.config.adapters.lora import Config as LoRA
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.costs.parameters import stage_sizes
from tests.support.configs import tiny_model, tiny_model_with_tower, tiny_run
from tests.support.vision_towers import TINY


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


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [("Et*3|tL", {}), ("E|t*4|L", {"pp": 3}), ("E|t*2|t|tL", {"overlap_p2p_comm": True, "tp": 2})],
)
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)])
def test_parameters_are_those_of_each_chunk_of_a_layout(layout, parallel, adapter, play, tmp_path):
    model = dataclasses.replace(tiny_model(), adapter=adapter)
    freeze = () if adapter is None else ("language_model", "vision_model")
    parallel = {"pp": 2, **parallel, "pipeline_model_parallel_layout": layout}
    config = run_of(model=model, training={"freeze": freeze}, **parallel)
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    tp = config.parallel.tensor_model_parallel_size
    for stage, size in enumerate(stage_sizes(config)):
        chunks = play(config, stage * tp, len(stage_sizes(config)) * tp, step=False).chunks
        learning = [sum(p.numel() for p in chunk.parameters() if p.requires_grad) for chunk in chunks]
        assert (list(size.learning_by_chunk), size.learning) == (learning, sum(learning))
        assert size.parameters == sum(p.numel() for chunk in chunks for p in chunk.parameters())


@pytest.mark.parametrize(("type", "settings"), TINY)
def test_parameters_of_a_split_tower_are_those_that_a_rank_builds(type, settings, play, tmp_path):
    model = tiny_model_with_tower(type, num_attention_heads=4, **settings)
    config = dataclasses.replace(run_of(2, model=model, vision_tensor_parallel=True), run_dir=str(tmp_path))
    (size,) = stage_sizes(config)
    found = counted(play(config, 1, 2, step=False))
    assert (found["vision_model"], found["vision_projection"]) == (size.vision_model, size.vision_projection)
    assert size.vision_model < 0.75 * stage_sizes(run_of(2, model=model))[0].vision_model


@pytest.mark.parametrize("changes", [{"drop_class_token": False}, {"feature_layer": -1}])
def test_parameters_of_other_towers_are_right_too(changes, play, tmp_path):
    model = tiny_model()
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, **changes))
    config = dataclasses.replace(run_of(model=model), run_dir=str(tmp_path))
    assert counted(play(config, 0, 1, step=False))["vision_model"] == stage_sizes(config)[0].vision_model


def test_parameters_of_a_linear_projection_are_right_too(play, tmp_path):
    model = tiny_model()
    model = dataclasses.replace(model, projection=make_projector("linear"))
    config = dataclasses.replace(run_of(model=model), run_dir=str(tmp_path))
    assert counted(play(config, 0, 1, step=False))["vision_projection"] == stage_sizes(config)[0].vision_projection


def test_frozen_parts_do_not_learn():
    size = stage_sizes(run_of(training={"freeze": ("vision_model", "language_model")}))[0]
    assert size.learning == size.vision_projection
