"""How a tensor of ours and the tensors of another format make each other: name pairs and a few named transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A lossless rearrangement, both ways; it also works on tensors without values (device "meta")."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Make our tensor of theirs."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """Make their tensors of ours."""


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor on both sides."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only part."""
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the tensor as the only part."""
        return [whole]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same values under another shape on their side."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only part in our shape."""
        return parts[0].reshape(self.ours)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the tensor in their shape."""
        return [whole.reshape(self.theirs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKeyValue:
    """Query, key and value, which megatron-core keeps group by group: the queries of a group, its key, its value.

    Works for weights float[rows, h] and biases float[rows].
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave query, key and value by group."""
        by_group = [part.reshape(self.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return query, key and value."""
        queries = self.num_attention_heads // self.num_query_groups * self.kv_channels
        by_group = whole.reshape(self.num_query_groups, -1, *whole.shape[1:])
        parts = by_group.split([queries, self.kv_channels, self.kv_channels], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Gate and up projection, which megatron-core keeps as one matrix, gate first."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack gate and up projection."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return gate and up projection."""
        return list(whole.chunk(2))


@dataclass(frozen=True, slots=True)
class LinearAsMLP:
    """One linear layer on our side; on theirs it is followed by a second one that changes nothing.

    Exact where the activation between the two is the identity: every product with a row of the identity matrix adds
    zeros to one value.
    """

    hidden_size: int
    of_bias: bool

    def _second(self, like: Tensor) -> Tensor:
        if self.of_bias:
            return torch.zeros(self.hidden_size, dtype=like.dtype, device=like.device)
        return torch.eye(self.hidden_size, dtype=like.dtype, device=like.device)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the first layer.

        Raises:
            ValueError: the second layer changes something.
        """
        first, second = parts
        if not second.is_meta and not torch.equal(second, self._second(second)):
            raise ValueError("the second layer of a linear projection is not the identity")
        return first

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the layer, and one that changes nothing."""
        return [whole, self._second(whole)]


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours and the tensors of the other format."""

    key: str
    """Checkpoint key of ours."""
    shape: tuple[int, ...]
    """Our shape; of one layer where `num_layers` is set."""
    names: tuple[str, ...]
    """Their names, in the order that `transform` takes; `{layer}` stands for the number of the layer."""
    transform: Transform = field(default_factory=Same)
    num_layers: int | None = None
    """Layers that our checkpoint stacks along the first axis; None: not a tensor of a layer."""
    is_vocabulary: bool = False
    """Whether the first axis is the vocabulary, which may have fewer rows on their side than ours, padded, has."""

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape under which a checkpoint holds the tensor."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers to go through; (None,) for a tensor outside the layers."""
        return (None,) if self.num_layers is None else tuple(range(self.num_layers))

    def names_of(self, layer: int | None) -> tuple[str, ...]:
        """Return their names for one layer."""
        return tuple(name.replace("{layer}", str(layer)) for name in self.names)

    def their_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of their tensors."""
        return [tuple(part.shape) for part in self.transform.split(torch.empty(self.shape, device="meta"))]
