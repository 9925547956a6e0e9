import pytest

from megatron_vlm.config import ParallelConfig

pytestmark = pytest.mark.distributed


def layouts(workers, world_size, **parallel):
    return workers.run("tests.support.jobs:describe_rank", world_size, parallel=ParallelConfig(**parallel))


def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart(workers):
    ranks = layouts(workers, 4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert [(rank.tp_rank, rank.pp_rank, rank.dp_rank) for rank in ranks] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 0),
    ]
    assert [rank.is_first_stage for rank in ranks] == [True, True, False, False]
    assert [rank.is_last_stage for rank in ranks] == [False, False, True, True]


def test_what_is_left_of_the_world_is_data_parallel(workers):
    ranks = layouts(workers, 4, tensor_model_parallel_size=2)
    assert {rank.dp_size for rank in ranks} == {2}
    assert ranks[3].describe() == "rank 3: dp 1, pp 0, tp 1"


def test_an_error_of_the_first_rank_is_raised_on_every_rank(workers):
    answers = workers.run("tests.support.jobs:fail_on_main", 2)
    assert answers == ["data is missing (shard 3); fix: prepare it"] * 2


def test_the_first_rank_is_done_before_the_others_begin(workers, tmp_path):
    assert workers.run("tests.support.jobs:write_then_read", 2, path=str(tmp_path / "file")) == ["built", "built"]
