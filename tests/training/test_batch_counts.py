import dataclasses

import pytest
import torch

from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.training import batch_counts
from megatron_vlm.training.batch_counts import BatchCounts, CountedBatches

PAD = 9


def make_batch(sample_ids=(4, 7)) -> VLMBatch:
    """Two rows of 6: samples of 4 and 3 tokens, the second one with padding up to 4, then padding."""
    empty = torch.empty(0, dtype=torch.int64)
    return VLMBatch(
        input_ids=torch.tensor([[1, 2, 3, 4, PAD, PAD, 1, 2, 3, PAD, PAD, PAD]]),
        labels=torch.full((1, 12), -100),
        cu_seqlens=torch.tensor([0, 4, 6, 10, 12], dtype=torch.int32),
        max_seqlen=64,
        label_index=empty,
        label_datasets=empty,
        image_token_index=empty,
        num_images=2,
        pixel_values=None,
        sample_ids=torch.tensor(sample_ids),
        samples_per_row=torch.tensor([1, 1]),
        dataset_samples={0: 1, 2: 1},
        dataset_tokens={0: 4, 2: 3},
        num_tokens=7,
        num_positions=12,
        attention_pairs=4 * 5 // 2 + 3 * 4 // 2,
    )


def counts_of(*batches, **place) -> BatchCounts:
    counts = BatchCounts(RankSlice(micro_batch_size=2, **place))
    for batch in batches:
        counts.add(batch)
    return counts


def test_counts_written_out():
    counts = counts_of(make_batch(), make_batch())
    assert (counts.num_tokens, counts.num_positions, counts.num_images) == (14, 24, 4)
    assert counts.attention_pairs == 2 * (4 * 5 // 2 + 3 * 4 // 2)
    assert [counts.dataset_samples[entry] for entry in range(4)] == [2, 0, 2, 0]
    assert [counts.dataset_tokens[entry] for entry in range(4)] == [8, 0, 6, 0]


def test_samples_are_hashed_at_the_rows_of_this_rank():
    first, second = make_batch(), make_batch((5, 6))
    assert counts_of(first, second).sample_hash != counts_of(second, first).sample_hash
    ranks = [{"data_parallel_rank": rank, "data_parallel_size": 2} for rank in (0, 1)]
    assert counts_of(first, **ranks[0]).sample_hash != counts_of(first, **ranks[1]).sample_hash
    swapped = dataclasses.replace(first, sample_ids=first.sample_ids.flip(0))
    assert counts_of(first).sample_hash != counts_of(swapped).sample_hash


@pytest.mark.parametrize("waits", [(0.5, 0.25), (0.0, 0.0)])
def test_waiting_for_batches_is_timed(monkeypatch, waits):
    now = [0.0]
    monkeypatch.setattr(batch_counts.time, "perf_counter", lambda: now[0])

    def batches():
        for wait in waits:
            now[0] += wait
            yield make_batch()

    counts = BatchCounts(RankSlice(micro_batch_size=2))
    counted = CountedBatches(batches(), counts, torch.device("cpu"))
    for _ in waits:
        next(counted)
        now[0] += 10.0  # the model's time is not counted
    assert counts.data_wait == sum(waits)
