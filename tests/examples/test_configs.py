"""Every example configuration is built and stepped, as every rank of its layout, with the model cut to a tiny size.

One process plays the ranks one after the other: torch's "fake" process group answers every collective at once. The
numbers mean nothing; that shapes, groups, frozen parts and optimizer fit together on every rank does.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.config import TrainConfig, derive_layout, load_config
from megatron_vlm.parallel.groups import build_groups, rank_layout, stop_distributed
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.step import train_step
from tests.support.jobs import CPU, SOURCES, FixedPlan, batches_of
from tests.support.samples import make_samples

EXAMPLES = Path(__file__).parents[2] / "examples"
# The number of ranks that each file is made for.
WORLD_SIZES = {
    "quickstart/align.yaml": 4,
    "quickstart/pretrain.yaml": 4,
    "quickstart/sft.yaml": 4,
    "vila_7b/align.yaml": 128,
    "vila_7b/pretrain.yaml": 128,
    "vila_7b/sft.yaml": 128,
}
SEQ_LENGTH = 64


def shrink(config, data_parallel_size, run_dir):
    """Return the same run with two layers, tiny widths, short rows and one micro-batch a pipeline stage."""
    parallel = config.parallel
    num_chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    num_heads = 2 * parallel.tensor_model_parallel_size
    language = replace(
        config.model.language,
        vocab_size=120,
        num_layers=max(2, num_chunks),
        hidden_size=8 * num_heads,
        ffn_hidden_size=16 * num_heads,
        num_attention_heads=num_heads,
    )
    vision = replace(
        config.model.vision,
        image_size=2 * config.model.vision.patch_size,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
    )
    batch_size = data_parallel_size * parallel.pipeline_model_parallel_size
    training = replace(config.training, global_batch_size=batch_size, train_iters=2, train_epochs=None)
    return replace(
        config,
        run_dir=str(run_dir),
        model=replace(config.model, language=language, vision=vision),
        data=replace(config.data, seq_length=SEQ_LENGTH),
        training=training,
        checkpoint=replace(config.checkpoint, load_weights=None),
    )


@pytest.fixture
def play(monkeypatch):
    """Build and step one rank of a world that is not there: `play(config, rank, world_size)` returns its layout."""
    empty = torch.empty

    def zeros(*args, **settings):
        # What a fake peer "sends" is whatever the buffer held; zeros keep the numbers finite.
        with torch.no_grad():
            return empty(*args, **settings).zero_()

    def tell(box, src):
        box[0] = []  # what the first rank says of the checkpoints in the run folder

    monkeypatch.setattr(torch, "empty", zeros)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", tell)

    def run(config, rank, world_size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            build_groups(config.parallel)
            state = build_state(config, rank_layout(), FixedPlan(2), SOURCES)
            rows = [[index % 8] for index in range(config.training.global_batch_size)]
            samples = make_samples(8, max_images=1)
            loaders = [batches_of(config, state.rank, rows, samples, 0) for _ in state.chunks]
            train_step(state, loaders, device=CPU, stop_requested=False)
            return state.rank
        finally:
            stop_distributed()

    return run


def test_every_example_has_a_number_of_ranks():
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml") if path.name != "base.yaml"}
    assert files == set(WORLD_SIZES)


@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_example_fits_its_ranks(name, world_size):
    layout = derive_layout(load_config(TrainConfig, EXAMPLES / name), world_size)
    assert layout.world_size == world_size


@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_every_rank_of_an_example_builds_and_steps(name, world_size, play, tmp_path):
    whole = load_config(TrainConfig, EXAMPLES / name)
    config = shrink(whole, derive_layout(whole, world_size).data_parallel_size, tmp_path)
    seen = {
        (rank.tp_rank, rank.pp_rank, rank.dp_rank) for rank in (play(config, r, world_size) for r in range(world_size))
    }
    assert len(seen) == world_size
