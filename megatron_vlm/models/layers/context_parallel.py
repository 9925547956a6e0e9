"""Attention whose keys and values are spread over the context-parallel ranks.

Every rank gathers the keys and values of all positions, and attends with its own queries. The backward pass sums the
gradients of keys and values over the ranks, each of which gets those of its own positions. Between the passes a rank
keeps its own keys and values only, and gathers the others again.

Source: Llama 3, arXiv:2407.21783, section 3.3.2. A ring would hide the exchange, but it cuts every sample into as many
parts as there are chunks: samples would have to be padded, and the plan of a run would depend on its layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

ProcessGroup = torch.distributed.ProcessGroup


def _missing() -> Tensor:
    """megatron-core's fields have defaults, so that those of a subclass must have one as well."""
    raise ValueError("ContextParams needs position_ids and key_index")


@dataclass
class ContextParams(PackedSeqParams):
    """Segments of the positions of a context-parallel rank; see `parallel.slicing.ContextSlice`.

    `cu_seqlens_q` are borders among its positions, `cu_seqlens_kv` borders in `key_index`.
    """

    position_ids: Tensor = field(default_factory=_missing)
    """int32[t / size]; positions inside the samples."""
    key_index: Tensor = field(default_factory=_missing)
    """int64[u]; rows of the gathered keys that the segments see."""


def attend_to_gathered(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_index: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Attend with the queries of this rank to the keys that they see of all ranks.

    Args:
        attend: attention of float[t / size, n, d], float[u, g, d] and float[u, g, d].
        query: float[t / size, n, d]; of this rank.
        key: float[t / size, g, d]; of this rank.
        value: float[t / size, g, d]; of this rank.
        key_index: int64[u]; rows of the keys that are gathered rank by rank.
        group: the context-parallel ranks.

    Returns:
        What `attend` returns.
    """
    seen_keys, seen_values = _Gather.apply(key, value, key_index, group)
    kept = _GatheredAgain(seen_keys, partial(_gather, key.detach(), value.detach(), key_index, group))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        return attend(query, seen_keys, seen_values)


def _gather(key: Tensor, value: Tensor, key_index: Tensor, group: ProcessGroup) -> Tensor:
    """Return keys and values side by side, float[u, g, 2 d]."""
    mine = torch.cat((key, value), dim=-1)
    gathered = mine.new_empty((group.size() * mine.size(0), *mine.shape[1:]))
    torch.distributed.all_gather_into_tensor(gathered, mine, group=group)
    return gathered.index_select(0, key_index)


class _Gather(torch.autograd.Function):
    """Returns keys and values, each a view of what `_gather` returns."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, key_index: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.save_for_backward(key_index)
        ctx.num_keys, ctx.group = key.size(0), group
        return _gather(key, value, key_index, group).chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (key_index,), num_keys, channels = ctx.saved_tensors, ctx.num_keys, grads[0].size(-1)
        of_all = grads[0].new_zeros((ctx.group.size() * num_keys, grads[0].size(1), 2 * channels))
        for target, grad in zip(of_all.chunk(2, dim=-1), grads, strict=True):
            # At most two segments of a rank see a key, so that the sum does not depend on an order.
            target.index_add_(0, key_index, grad)
        mine = of_all.new_empty((num_keys, *of_all.shape[1:]))
        torch.distributed.reduce_scatter_tensor(mine, of_all, group=ctx.group)
        return *mine.chunk(2, dim=-1), None, None


class _GatheredAgain:
    """Keeps views of a tensor for the backward pass by their shape only; it is computed again when one is asked for.

    Args:
        view: of the tensor.
        compute: returns the tensor again.
    """

    def __init__(self, view: Tensor, compute: Callable[[], Tensor]) -> None:
        self._storage, self._compute = view.untyped_storage()._cdata, compute
        self._num_views = self._left = 0
        self._again: Tensor | None = None

    def pack(self, x: Tensor) -> Any:
        """Return what is kept of a tensor."""
        if x.untyped_storage()._cdata != self._storage:
            return x
        self._num_views += 1
        return x.shape, x.stride(), x.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor of which `kept` was kept."""
        if isinstance(kept, Tensor):
            return kept
        if self._again is None:
            self._again, self._left = self._compute(), self._num_views
        whole, self._left = self._again, self._left - 1
        if not self._left:  # the last view that is asked for; the tensor may go with it
            self._again = None
        return whole.as_strided(*kept)
