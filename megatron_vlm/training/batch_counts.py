"""Count what the micro-batches of a step contain, on the host, on their way to the model."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_vlm.data.loading.batch import BadImage, VLMBatch
from megatron_vlm.data.plan.row_hash import HASH_BITS, hash_rows
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.platform.launch.heartbeat import beat
from megatron_vlm.platform.step_phases import StepPhase, phase


@dataclass(slots=True)
class BatchCounts:
    """Contents of the micro-batches that this rank has seen in one step."""

    rank_slice: RankSlice
    num_micro_batches: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    """Of the rows, also those behind their samples that are left out."""
    num_images: int = 0
    attention_pairs: int = 0
    dataset_samples: Counter[int] = field(default_factory=Counter)
    """By blend entry; of a long sample, only its first fragment."""
    dataset_tokens: Counter[int] = field(default_factory=Counter)
    """By blend entry, without padding."""
    data_wait: float = 0.0
    """Time that this rank waited for its micro-batches [s]."""
    sample_hash: int = 0
    """Hash of the samples received, at the rows that belong to this rank; see `hash_rows`."""
    bad_images: list[BadImage] = field(default_factory=list)
    """Images that this rank could not read."""

    def add(self, batch: VLMBatch) -> None:
        """Count the next micro-batch, which is still on the host."""
        self.num_tokens += batch.num_tokens
        self.num_positions += batch.num_positions
        self.num_images += batch.num_images
        self.attention_pairs += batch.attention_pairs
        self.dataset_samples.update(batch.dataset_samples)
        self.dataset_tokens.update(batch.dataset_tokens)
        self.bad_images += batch.bad_images
        rows = self.rank_slice.rows(self.num_micro_batches)
        self.sample_hash += hash_rows(batch.sample_ids.numpy(), batch.samples_per_row.numpy(), rows)
        self.sample_hash %= 1 << HASH_BITS
        self.num_micro_batches += 1


class CountedBatches:
    """Passes micro-batches on to the device, counting their contents and the time spent waiting for them."""

    def __init__(self, batches: Iterator[VLMBatch], counts: BatchCounts, device: torch.device) -> None:
        self.batches, self.counts, self.device = batches, counts, device

    def __next__(self) -> VLMBatch:
        beat()
        start = time.perf_counter()
        with phase(StepPhase.DATA):
            batch = next(self.batches)
        self.counts.data_wait += time.perf_counter() - start
        self.counts.add(batch)
        return batch.to(self.device, non_blocking=True) if self.device.type != "cpu" else batch
