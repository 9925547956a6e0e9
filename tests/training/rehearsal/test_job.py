import pytest

from megatron_vlm.config import derive_layout
from megatron_vlm.training.rehearsal.job import micro_batches_to_play, playable, ranks_to_play
from tests.support.configs import tiny_run


def run_of(tp=1, pp=1, vpp=None, global_batch_size=32):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "overlap_p2p_comm": vpp is not None,
    }
    return tiny_run(parallel=parallel, training={"global_batch_size": global_batch_size})


@pytest.mark.parametrize(
    ("sizes", "world_size", "ranks"),
    [
        ({"tp": 2, "pp": 2}, 16, (0, 1, 2, 8, 9, 10)),
        ({"tp": 4}, 8, (0, 3, 4)),
        ({"pp": 4}, 8, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"pp": 2}, 2, (0, 1)),
        ({}, 1, (0,)),
    ],
)
def test_each_stage_has_two_ranks_of_each_of_its_groups(sizes, world_size, ranks):
    config = run_of(**sizes)
    assert ranks_to_play(config, derive_layout(config, world_size)) == ranks


@pytest.mark.parametrize(
    ("sizes", "world_size", "count"),
    [
        ({}, 1, 4),
        ({"pp": 2}, 2, 5),
        ({"pp": 2}, 16, 4),
        ({"pp": 2, "vpp": 2}, 2, 8),
        ({"global_batch_size": 2}, 1, 2),
    ],
)
def test_micro_batches_fill_the_pipeline_and_are_no_more_than_the_run_has(sizes, world_size, count):
    config = run_of(**sizes)
    assert micro_batches_to_play(config, derive_layout(config, world_size)) == count


def test_run_to_play_starts_from_nothing_and_writes_elsewhere():
    config = tiny_run("run")
    played = playable(config, "elsewhere")
    assert (played.run_dir, played.model.backend, played.checkpoint.load_weights) == ("elsewhere", "torch", None)
    assert played.model.language == config.model.language
