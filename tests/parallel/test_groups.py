import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.parallel import groups
from megatron_vlm.parallel.groups import single_process

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


def test_process_of_its_own_is_a_job_of_one_rank_for_a_while():
    with single_process():
        assert torch.distributed.get_world_size() == 1
        with single_process():  # a running job is used
            assert torch.distributed.is_initialized()
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_job_is_not_bound_to_a_device_since_the_last_stage_makes_no_group_of_its_own(monkeypatch):
    given = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kwargs: given.update(kwargs))
    monkeypatch.setattr(groups, "build_groups", lambda parallel: None)
    monkeypatch.setattr(groups, "rank_layout", lambda: None)
    groups.start_distributed(ParallelConfig(), torch.device("cuda", 1), "nccl")
    assert set(given) == {"timeout"}


@pytest.mark.parametrize(
    ("split", "expected"), [(False, [(0, 4), (1, 4), (2, 4), (3, 4)]), (True, [(0, 2)] * 2 + [(1, 2)] * 2)]
)
def test_tensor_parallel_ranks_of_a_split_tower_encode_the_same_images(workers, split, expected):
    ranks = layouts(workers, 4, tensor_model_parallel_size=2, context_parallel_size=2)
    shares = [rank.image_share(vision_tensor_parallel=split) for rank in ranks]
    assert [(share.rank, share.size) for share in shares] == expected
