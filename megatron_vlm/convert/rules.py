"""How our tensors and those of another format correspond: pairs of names and a few named transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from megatron_vlm.platform.reused_tensors import empty

_MEAN_COLUMNS = 512
"""Converted to float32 at a time for the mean of the vocabulary's rows, which are the largest tensors of a model."""


class Transform(Protocol):
    """A lossless rearrangement in both directions; it also works on tensors without values (device "meta")."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Make our tensor from theirs."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """Make their tensors from ours."""


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor on both sides."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return their only tensor."""
        return theirs[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return our tensor as their only one."""
        return [whole]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same values, with another shape on their side."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return their only tensor in our shape."""
        return theirs[0].reshape(self.ours)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the tensor in their shape."""
        return [whole.reshape(self.theirs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKeyValue:
    """Query, key and value, which megatron-core stores group by group: the queries of a group, its key, its value.

    Works for weights float[rows, h] and biases float[rows].
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    @classmethod
    def of_heads(cls, hidden_size: int, num_attention_heads: int) -> "QueryKeyValue":
        """Return the transform of an attention that has a key and a value for every query."""
        channels = hidden_size // num_attention_heads
        return cls(num_attention_heads=num_attention_heads, num_query_groups=num_attention_heads, kv_channels=channels)

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Interleave query, key and value by group."""
        by_group = [tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:]) for tensor in theirs]
        return _cat(by_group, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return query, key and value."""
        queries = self.num_attention_heads // self.num_query_groups * self.kv_channels
        by_group = whole.reshape(self.num_query_groups, -1, *whole.shape[1:])
        theirs = by_group.split([queries, self.kv_channels, self.kv_channels], dim=1)
        return [_flattened(tensor) for tensor in theirs]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return `torch.cat` of the tensors in memory that is used again."""
    first = tensors[0]
    sizes = list(first.shape)
    sizes[dim] = sum(tensor.shape[dim] for tensor in tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat(list(tensors), dim=dim, out=empty(sizes, dtype, first.device))


def _flattened(tensor: Tensor) -> Tensor:
    """Return a copy whose first two axes are one, in memory that is used again."""
    flat = empty((tensor.shape[0] * tensor.shape[1], *tensor.shape[2:]), tensor.dtype, tensor.device)
    flat.view(tensor.shape).copy_(tensor)
    return flat


@dataclass(frozen=True, slots=True)
class FusedQueryKeyValue:
    """Query, key and value in one tensor on their side as well: all queries, all keys, all values; as many of each."""

    by_group: QueryKeyValue

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Interleave query, key and value by group."""
        return self.by_group.join(theirs[0].chunk(3))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return all queries, then all keys, then all values."""
        return [_cat(self.by_group.split(whole))]


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Gate and up projection, which megatron-core stores as one matrix, gate first."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Stack gate and up projection."""
        return _cat(theirs)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return gate and up projection."""
        return list(whole.chunk(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Rows of the vocabulary, of which the two sides have different numbers.

    Both have those of the tokenizer. Rows of other tokens, and those that a tokenizer has and their side lacks, hold
    the mean of the tokenizer's rows: their logits are those of an average token, which is never the most likely one.
    The rows behind them, which only our side has, are zero.
    """

    vocab_size: int
    """Entries of the tokenizer."""
    num_token_ids: int
    """Ids of our batches: those of the tokenizer, image and padding."""
    num_rows: int
    """Rows on our side."""
    num_their_rows: int

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return our rows."""
        (rows,) = theirs
        return _with_means(rows[: self.vocab_size], self.num_token_ids, self.num_rows)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return their rows."""
        size = self.num_their_rows
        return [_with_means(whole[: min(self.vocab_size, size)], size, size)]


def _with_means(rows: Tensor, size: int, num_rows: int) -> Tensor:
    """Return `num_rows` rows: these, their mean up to `size`, and zeros."""
    if len(rows) == num_rows:
        return rows
    whole = empty((num_rows, *rows.shape[1:]), rows.dtype, rows.device)
    whole[: len(rows)] = rows
    if size > len(rows):
        whole[len(rows) : size] = _mean(rows)
    whole[size:] = 0
    return whole


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of the rows, summed in float32; only a part of the columns is converted at a time."""
    means = []
    for columns in rows.split(_MEAN_COLUMNS, dim=1):
        wide = empty(columns.shape, torch.float32, rows.device)
        means.append(wide.copy_(columns).mean(0).to(rows.dtype))
    return torch.cat(means)


@dataclass(frozen=True, slots=True)
class LinearAsMLP:
    """One linear layer on our side; on theirs, it is followed by a second one that is the identity.

    Exact if the activation between the two is the identity, too: every product with a row of the identity matrix adds
    zeros to one value.
    """

    hidden_size: int
    of_bias: bool

    def _second(self, like: Tensor) -> Tensor:
        if self.of_bias:
            return torch.zeros(self.hidden_size, dtype=like.dtype, device=like.device)
        return torch.eye(self.hidden_size, dtype=like.dtype, device=like.device)

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return the first layer.

        Raises:
            ValueError: the second layer is not the identity.
        """
        first, second = theirs
        if not second.is_meta and not torch.equal(second, self._second(second)):
            raise ValueError("the second layer of a linear projection is not the identity")
        return first

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the layer and the identity."""
        return [whole, self._second(whole)]


@dataclass(frozen=True, slots=True)
class LinearAsPair:
    """One linear layer on our side; two on theirs, with a ReLU or a GELU between them.

    The first makes x and -x, the second multiplies what the activation leaves of them by W and -W:
    W relu(x) - W relu(-x) = W x, and so with gelu, which rounds.
    """

    input_size: int
    hidden_size: int
    """Between the two layers; at least 2 * `input_size`."""
    of_bias: bool

    def _first(self, like: Tensor) -> Tensor:
        if self.of_bias:
            return torch.zeros(self.hidden_size, dtype=like.dtype, device=like.device)
        first = torch.zeros(self.hidden_size, self.input_size, dtype=like.dtype, device=like.device)
        identity = torch.eye(self.input_size, dtype=like.dtype, device=like.device)
        first[: 2 * self.input_size] = torch.cat([identity, -identity])
        return first

    def _second(self, whole: Tensor) -> Tensor:
        if self.of_bias:
            return whole
        rest = self.hidden_size - 2 * self.input_size
        return torch.cat([whole, -whole, whole.new_zeros(len(whole), rest)], dim=1)

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return the layer.

        Raises:
            ValueError: the two layers are not such a pair.
        """
        first, second = theirs
        whole = second if self.of_bias else second[:, : self.input_size].contiguous()
        if not whole.is_meta and not all(map(torch.equal, (first, second), self.split(whole))):
            raise ValueError("the two layers of the projection with a ReLU are not those of a linear one")
        return whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return both layers."""
        return [self._first(whole), self._second(whole)]


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our tensors and its counterparts in the other format."""

    key: str
    """Our checkpoint key."""
    shape: tuple[int, ...]
    """Our shape; that of one layer if `num_layers` is set."""
    names: tuple[str, ...]
    """Their names, in the order that `transform` expects; `{layer}` stands for the index of the layer."""
    transform: Transform = field(default_factory=Same)
    num_layers: int | None = None
    """Layers that our checkpoint stacks along the first axis; None if the tensor does not belong to a layer."""
    scale: str = ""
    """Their name of factors of our rows; a folder may lack it. We have no place for them: they go into the rows."""

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in a checkpoint."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers to convert; (None,) for a tensor outside the layers."""
        return (None,) if self.num_layers is None else tuple(range(self.num_layers))

    def names_of(self, layer: int | None) -> tuple[str, ...]:
        """Return their names for one layer."""
        return tuple(name.replace("{layer}", str(layer)) for name in self.names)

    def scale_of(self, layer: int | None) -> str:
        """Return their name of the factors for one layer; empty if there are none."""
        return self.scale.replace("{layer}", str(layer))

    def their_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of their tensors."""
        return [tuple(tensor.shape) for tensor in self.transform.split(torch.empty(self.shape, device="meta"))]
