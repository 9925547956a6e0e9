"""Every example configuration is built and stepped, as every rank of its layout, with the model cut to a tiny size.

One process plays the ranks one after the other: torch's "fake" process group answers every collective at once. The
numbers mean nothing; that shapes, groups, frozen parts and optimizer fit together on every rank does.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.config import TrainConfig, derive_layout, load_config
from megatron_vlm.training.rehearsal.job import ranks_to_play

EXAMPLES = Path(__file__).parents[2] / "examples"
# The number of ranks that each file is made for.
WORLD_SIZES = {
    "quickstart/align.yaml": 4,
    "quickstart/pretrain.yaml": 4,
    "quickstart/sft.yaml": 4,
    "smolvlm/align.yaml": 1,
    "vila_7b/align.yaml": 128,
    "vila_7b/h100/align.yaml": 64,
    "vila_7b/h100/pretrain.yaml": 64,
    "vila_7b/h100/sft.yaml": 64,
    "vila_7b/lora.yaml": 8,
    "vila_7b/pretrain.yaml": 128,
    "vila_7b/resolution/finish_336.yaml": 128,
    "vila_7b/resolution/pretrain_224.yaml": 128,
    "vila_7b/sft.yaml": 128,
    "vila_7b/visual_expert.yaml": 128,
}
SEQ_LENGTH = 64


def shrink(config, data_parallel_size, run_dir):
    """Return the same run with two layers, tiny widths, short rows and one micro-batch a pipeline stage."""
    parallel = config.parallel
    num_chunks = parallel.pipeline_model_parallel_size * (parallel.num_model_chunks or 1)
    num_heads = 2 * parallel.tensor_model_parallel_size
    language = replace(
        config.model.language,
        vocab_size=120,
        num_layers=max(2, num_chunks),
        hidden_size=8 * num_heads,
        ffn_hidden_size=16 * num_heads,
        num_attention_heads=num_heads,
        num_query_groups=None,
        kv_channels=None,
    )
    vision = replace(
        config.model.vision,
        image_size=2 * config.model.vision.patch_size,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
    )
    batch_size = config.training.micro_batch_size * data_parallel_size * parallel.pipeline_model_parallel_size
    training = replace(config.training, global_batch_size=batch_size, train_iters=2, train_epochs=None)
    return replace(
        config,
        run_dir=str(run_dir),
        model=replace(config.model, language=language, vision=vision),
        data=replace(config.data, seq_length=SEQ_LENGTH),
        training=training,
        checkpoint=replace(config.checkpoint, load_weights=None),
    )


def test_every_example_has_a_number_of_ranks():
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml") if path.name != "base.yaml"}
    rehearsed = {name for name in files if name.startswith("presets/")}  # see test_presets.py
    assert files - rehearsed == set(WORLD_SIZES)


@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_example_fits_its_ranks(name, world_size):
    layout = derive_layout(load_config(TrainConfig, EXAMPLES / name), world_size)
    assert layout.world_size == world_size


def test_larger_images_start_from_the_run_with_small_ones():
    small, large = (
        load_config(TrainConfig, EXAMPLES / "vila_7b" / "resolution" / name)
        for name in ("pretrain_224.yaml", "finish_336.yaml")
    )
    assert (small.model.vision.image_size, large.model.vision.image_size) == (224, 336)
    assert replace(large.model.vision, image_size=224) == small.model.vision
    assert large.checkpoint.load_weights == small.run_dir != large.run_dir


@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_a_rank_of_every_kind_of_an_example_builds_and_steps(name, world_size, play, tmp_path):
    assert_ranks_step(name, world_size, ranks_to_play, play, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_every_rank_of_an_example_builds_and_steps(name, world_size, play, tmp_path):
    assert_ranks_step(name, world_size, lambda config, layout: range(layout.world_size), play, tmp_path)


def assert_ranks_step(name, world_size, choose, play, run_dir):
    whole = load_config(TrainConfig, EXAMPLES / name)
    layout = derive_layout(whole, world_size)
    config, chosen = shrink(whole, layout.data_parallel_size, run_dir), choose(whole, layout)
    ranks = [play(config, rank, world_size).rank for rank in chosen]
    assert len({(rank.tp_rank, rank.pp_rank, rank.dp_rank) for rank in ranks}) == len(chosen) > 0
