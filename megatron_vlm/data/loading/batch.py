"""One micro-batch as the model sees it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part", "ContextBatch", "VLMBatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class BadImage:
    """An image that could not be read; a blank one stands in its place."""

    sample_id: int
    """As the plan counts."""
    dataset: int
    """Blend entry that it comes from."""
    where: str
    """Dataset, shard and sample; for a fragment, its tokens."""
    image: int
    """Counted within the sample or fragment."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContextBatch:
    """What a context-parallel rank needs to know of the whole micro-batch; see `parallel.slicing.ContextSlice`."""

    position_ids: Tensor
    """int32[t]."""
    key_index: Tensor
    """int64[u]."""
    key_cu_seqlens: Tensor
    """int32[n + 1]."""
    max_keys: int
    """At least the most keys of a segment, rounded up. [tokens]"""
    image_index: Tensor
    """int64[k]; one row of the image embeddings for each entry of `image_token_index`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VLMBatch:
    """One micro-batch: its rows, concatenated to one packed sequence of t positions.

    Each sample is an attention segment, and so is padding behind samples: the segments cover all t positions. t is
    micro_batch_size * seq_length, or less where positions behind the last sample of each row are left out. With
    `sample_multiple`, a sample's segment ends with padding up to the next multiple.

    A context-parallel rank has only its own positions of them; fields that speak of the whole micro-batch still do.
    """

    input_ids: Tensor
    """int64[1, t]; the image placeholder at image positions, the padding id at padding."""
    labels: Tensor
    """int64[1, t]; already shifted, IGNORE_INDEX where there is no loss."""
    cu_seqlens: Tensor
    """int32[n + 1]; segment borders, from 0 to t."""
    max_seqlen: int
    """At least the longest segment, rounded up; see `collate`. [tokens]"""
    label_index: Tensor
    """int64[k]; flat positions that have a loss, ascending."""
    label_datasets: Tensor
    """int64[k]; blend entry that each of them comes from."""
    image_token_index: Tensor
    """int64[k]; flat positions of the placeholders, image by image in reading order."""
    num_images: int
    """Images of the whole micro-batch, over all shares."""
    image_lengths: tuple[int, ...] | None = None
    """Placeholders of each of these images, in reading order; None where every image has the same number."""
    pixel_values: Tensor | None
    """uint8[share, 3, height, width]; this rank's share of the images. None where the stage needs no pixels."""
    sample_ids: Tensor
    """int64[num_samples]; in the order of their segments; as the plan counts them, fragments of long samples included.
    """
    samples_per_row: Tensor
    """int64[micro_batch_size]; how many of `sample_ids` each row holds."""
    dataset_samples: Mapping[int, int]
    """Samples of each blend entry that has one; of a long sample, only its first fragment counts."""
    dataset_tokens: Mapping[int, int]
    """Positions of each blend entry that has one, without padding."""
    num_tokens: int
    """Positions of the whole micro-batch that are not padding."""
    num_positions: int
    """Positions of the rows of the whole micro-batch, micro_batch_size * seq_length, also if some are left out."""
    attention_pairs: int
    """Query-key pairs of causal attention inside the samples of the whole micro-batch, without padding."""
    context: ContextBatch | None = None
    """Where context-parallel ranks share the positions."""
    bad_images: tuple[BadImage, ...] = ()
    """Those of this rank's share of the images that could not be read."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VLMBatch":
        """Return the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VLMBatch":
        """Return the batch in page-locked memory; torch's DataLoader calls it before a copy to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "VLMBatch":
        context = None if self.context is None else _map_tensors(self.context, change)
        return dataclasses.replace(_map_tensors(self, change), context=context)


def _map_tensors(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(part, **changed)
