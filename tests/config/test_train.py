import dataclasses

import pytest

from megatron_vlm.config import (
    PART_NAMES,
    BlendEntry,
    CheckpointConfig,
    ConfigError,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from tests.support.configs import tiny_run


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (ParallelConfig, "tensor_model_parallel_size", 0),
        (ParallelConfig, "pipeline_model_parallel_size", -1),
        (ParallelConfig, "distributed_timeout_minutes", 0),
        (ParallelConfig, "ddp_bucket_size", 0),
        (TrainingConfig, "global_batch_size", 0),
        (TrainingConfig, "micro_batch_size", 0),
        (TrainingConfig, "train_iters", 0),
        (TrainingConfig, "num_threads", 0),
        (CheckpointConfig, "save_interval", 0),
    ],
)
def test_size_that_is_not_positive_is_refused(section, name, value):
    needed = {"global_batch_size": 1, "train_iters": 1} if section is TrainingConfig else {}
    with pytest.raises(ConfigError, match=f"{name}={value} is not positive"):
        section(**{**needed, name: value})


@pytest.mark.parametrize(
    ("section", "name"),
    [(OptimizerConfig, "lr"), (OptimizerConfig, "clip_grad"), (CheckpointConfig, "keep_last")],
)
def test_negative_setting_is_refused(section, name):
    needed = {"lr": 1.0} if section is OptimizerConfig else {}
    with pytest.raises(ConfigError, match=f"{name}=-1 is negative"):
        section(**{**needed, name: -1})


def test_sequence_parallel_without_tensor_parallel_is_refused():
    with pytest.raises(ConfigError, match="sequence_parallel needs tensor_model_parallel_size > 1"):
        ParallelConfig(sequence_parallel=True)


@pytest.mark.parametrize(
    "settings", [{"overlap_grad_reduce": False}, {"overlap_grad_reduce": True, "use_distributed_optimizer": False}]
)
def test_parameter_overlap_without_what_it_stands_on_is_refused(settings):
    with pytest.raises(ConfigError, match="overlap_param_gather needs use_distributed_optimizer"):
        ParallelConfig(overlap_param_gather=True, **settings)


def test_bucket_size_that_nothing_would_use_is_refused():
    with pytest.raises(ConfigError, match="ddp_bucket_size needs overlap_grad_reduce"):
        ParallelConfig(ddp_bucket_size=1000)


def test_virtual_pipeline_over_two_stages_without_overlap_is_refused():
    with pytest.raises(ConfigError, match=r"wrong gradients in megatron-core.*parallel.overlap_p2p_comm=true"):
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


@pytest.mark.parametrize(("stages", "overlap"), [(2, True), (4, False), (4, True)])
def test_virtual_pipeline_that_computes_right_is_accepted(stages, overlap):
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=overlap
    )
    assert parallel.overlap_p2p_comm is overlap


def test_virtual_pipeline_without_a_pipeline_is_refused():
    with pytest.raises(ConfigError, match="virtual_pipeline_model_parallel_size needs a pipeline"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)


def test_pipeline_overlap_without_a_virtual_pipeline_is_refused():
    with pytest.raises(ConfigError, match="overlap_p2p_comm needs virtual_pipeline_model_parallel_size"):
        ParallelConfig(pipeline_model_parallel_size=2, overlap_p2p_comm=True)


def test_uneven_stages_of_a_virtual_pipeline_are_refused():
    with pytest.raises(ConfigError, match="cannot be combined with a virtual pipeline"):
        ParallelConfig(
            pipeline_model_parallel_size=4,
            virtual_pipeline_model_parallel_size=2,
            num_layers_in_first_pipeline_stage=3,
        )


@pytest.mark.parametrize("length", [{}, {"train_iters": 5, "train_epochs": 1.0}])
def test_length_of_the_training_is_set_exactly_once(length):
    with pytest.raises(ConfigError, match=r"exactly one of training.train_iters and training.train_epochs"):
        TrainingConfig(global_batch_size=1, **length)


def test_freezing_every_part_is_refused():
    with pytest.raises(ConfigError, match="nothing would learn"):
        tiny_run(training={"freeze": PART_NAMES})


def test_freezing_all_but_one_part_is_accepted():
    assert tiny_run(training={"freeze": PART_NAMES[:2]}).training.freeze == PART_NAMES[:2]


def test_freezing_every_parameter_by_patterns_is_refused():
    with pytest.raises(ConfigError, match=r"training.freeze matches every parameter .*; fix: leave one part out"):
        tiny_run(training={"freeze": ("vision_*", "language_model.*")})


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("training", {"freeze": ("vision_modle",)}),
        ("optimizer", {"lr_multipliers": {"vision_modle": 0.1}}),
        ("optimizer", {"no_weight_decay": ("vision_modle",)}),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_before_a_rank_starts(section, settings):
    (name,) = settings
    message = rf"{section}.{name}: 'vision_modle' matches no parameter of the model; fix: did you mean vision_model"
    with pytest.raises(ConfigError, match=message):
        tiny_run(**{section: settings})


@pytest.mark.parametrize("factor", [0, -1])
def test_a_factor_on_the_learning_rate_is_positive(factor):
    with pytest.raises(ConfigError, match=r"lr_multipliers: .* for 'vision_model' is not positive; fix: .*freeze"):
        tiny_run(optimizer={"lr_multipliers": {"vision_model": factor}})


@pytest.mark.parametrize("section", ["data", "training"])
def test_validation_is_configured_as_a_whole(section):
    config = tiny_run()
    changes = {
        "data": dataclasses.replace(config.data, validation=(BlendEntry(path="v"),)),
        "training": dataclasses.replace(config.training, validation_interval=5),
    }
    assert dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError, match=r"only one of data.validation and training.validation_interval is set"):
        dataclasses.replace(config, **{section: changes[section]})


def test_default_fp8_recipe_leaves_no_state_to_save():
    assert TrainingConfig(global_batch_size=1, train_iters=1).fp8_recipe == "tensorwise"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"training.num_layers_at_end_in_bf16 needs training.fp8"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, r"cannot be combined with training.fp8_recipe=delayed"),
    ],
)
def test_layers_in_bf16_without_an_fp8_that_allows_them_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(training={"num_layers_at_end_in_bf16": 1, **settings})
    with pytest.raises(ConfigError, match="num_layers_at_end_in_bf16=-1 is negative"):
        tiny_run(training={"fp8": "hybrid", "num_layers_at_end_in_bf16": -1})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("training", "seed", -1),
        ("training", "global_batch_size", 10**12),
        ("training", "micro_batch_size", 10**12),
        ("training", "train_iters", 10**12),
        ("training", "num_threads", 10**9),
        ("training", "validation_iters", 10**12),
        ("optimizer", "adam_beta1", 1.0),
        ("optimizer", "adam_beta2", 2.0),
        ("optimizer", "adam_beta2", -0.1),
        ("optimizer", "adam_eps", -1.0),
        ("optimizer", "adam_eps", 0.0),
        ("optimizer", "lr_warmup_fraction", 1.5),
        ("optimizer", "min_lr", 1.0),
        ("parallel", "distributed_timeout_minutes", 1e300),
        ("parallel", "distributed_timeout_minutes", 1e-9),
        ("data", "seq_length", 2**31),
        ("data", "length_multiple", 2**31),
        ("data", "num_workers", 10**6),
        ("data", "prefetch_factor", 10**6),
        ("data", "tokenizer", ""),
        ("language", "num_layers", 10**9),
        ("language", "hidden_size", 10**9),
        ("language", "ffn_hidden_size", 10**12),
        ("language", "vocab_size", 10**12),
        ("language", "max_position_embeddings", 10**12),
        ("vision", "num_layers", 10**9),
        ("vision", "image_size", 8 * 10**9),
        ("checkpoint", "load_weights", ""),
    ],
)
def test_a_value_that_no_rank_could_start_with_is_refused_with_its_key(section, name, value):
    run = tiny_run()
    parts = {part: getattr(run.model, part) for part in ("language", "vision")}

    def change():
        changed = dataclasses.replace(parts.get(section) or getattr(run, section), **{name: value})
        dataclasses.replace(run, **{section: changed})

    with pytest.raises(ConfigError, match=rf"{section}\.{name}(=| is)"):
        change()


def test_a_plan_of_more_rows_than_it_can_count_is_refused():
    with pytest.raises(ConfigError, match="train_iters=3000000 of training.global_batch_size=1024"):
        TrainingConfig(train_iters=3_000_000, global_batch_size=1024)


@pytest.mark.parametrize("name", ["weight", "epochs", "images"])
def test_an_endless_blend_entry_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} above 1,000,000"):
        BlendEntry(path="a", **{name: 1e300})


@pytest.mark.parametrize("path", ["", "  ", "a" * 256, "a/" * 2500, "é" * 128])
def test_a_path_that_cannot_exist_is_refused(path):
    with pytest.raises(ConfigError, match="run_dir"):
        tiny_run(path)


@pytest.mark.parametrize("path", ["a" * 255, "a/" * 2000, "é" * 127])
def test_a_long_path_is_taken(path):
    assert tiny_run(path).run_dir == path
