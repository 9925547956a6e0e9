"""Sums over the ranks, computed by hand."""

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.parallel.groups import rank_layout
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.training.batch_counts import BatchCounts
from megatron_vlm.training.totals import losses_by_name, mean_loss, sum_over_ranks


def totals(workers, world_size, **parallel):
    answers = workers.run("tests.support.jobs:sum_counts", world_size, parallel=ParallelConfig(**parallel))
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


@pytest.mark.distributed
def test_data_parallel_ranks_add_up_and_their_waits_are_averaged(workers):
    found = totals(workers, 2)
    # Rank r has losses r + 1 of one label for the first dataset, 10 tokens, and waits r + 1 seconds.
    assert (found.losses, found.labels) == ([3.0, 0.0], [2.0, 0.0])
    assert (found.num_tokens, found.num_positions, found.num_images, found.attention_pairs) == (20, 40, 4, 110)
    assert (found.dataset_samples, found.dataset_tokens) == ((0, 3), (8, 12))
    assert found.images_of_ranks == (1, 3)
    assert found.data_wait == 1.5
    assert found.stop_requested
    assert found.sample_hash == found.sample_hash_of_all == 2**63 + 2**63 + 1 - 2**64


@pytest.mark.distributed
def test_tensor_parallel_ranks_count_once(workers):
    found = totals(workers, 2, tensor_model_parallel_size=2)
    assert (found.losses, found.labels, found.num_tokens, found.data_wait) == ([1.0, 0.0], [1.0, 0.0], 10, 1.0)
    assert (found.dataset_samples, found.dataset_tokens, found.images_of_ranks) == ((0, 1), (4, 6), (1,))
    assert found.sample_hash == 2**63
    assert found.sample_hash_of_all == 1


@pytest.mark.distributed
def test_stages_give_the_loss_of_the_last_and_the_wait_of_the_first(workers):
    found = totals(workers, 2, pipeline_model_parallel_size=2)
    assert (found.losses, found.num_tokens, found.data_wait) == ([2.0, 0.0], 10, 1.0)
    assert (found.dataset_samples, found.dataset_tokens, found.images_of_ranks) == ((0, 2), (4, 6), (3,))
    assert (found.sample_hash, found.sample_hash_of_all) == (2**63 + 1, 1)


def test_datasets_of_one_name_count_together_and_every_label_alike():
    assert losses_by_name("aba", [6.0, 5.0, 10.0], [3.0, 2.0, 1.0]) == {"a": 4.0, "b": 2.5}
    assert mean_loss(21.0, 6.0) == 3.5


def test_without_labels_there_is_no_loss():
    assert losses_by_name("ab", [6.0, 0.0], [3.0, 0.0]) == {"a": 2.0}
    assert mean_loss(0.0, 0.0) is None


def test_the_norm_of_the_gradient_is_read_with_the_sums(one_rank):
    rank, counts = rank_layout(), BatchCounts(RankSlice())
    options = {"num_datasets": 1, "stop_requested": False, "device": torch.device("cpu")}
    norm = torch.tensor(0.1, dtype=torch.float64)
    assert sum_over_ranks([], [counts], rank, **options, grad_norm=norm).grad_norm == 0.1
    assert sum_over_ranks([], [counts], rank, **options).grad_norm == 0.0
