"""Attention core for packed samples without transformer-engine."""

import functools
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.models.layers.block_attention import attend_by_blocks
from megatron_vlm.models.layers.context_parallel import attend_to_gathered

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# In half precision, scores need more bits than the inputs; torch's own kernel keeps them.
_BLOCK_DTYPES = (torch.float32, torch.float64)
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class PackedAttention(MegatronModule):
    """Scaled dot-product attention inside each sample of a packed sequence; takes no masks.

    On a GPU, torch's variable-length kernel processes all samples at once. It takes half precision only, so on the CPU
    and in float32 the samples are processed one by one, and there is never a sequence x sequence matrix. A plain
    [s, b, n, d] input is a batch of samples of equal length.

    With context parallelism, the keys and values are gathered first; see `context_parallel.py`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout}: the torch backend has no attention dropout; set it to 0")
        self.causal = attn_mask_type in _CAUSAL
        self.cp_group = None if config.context_parallel_size == 1 else _context_group(pg_collection, self.causal)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: float[t, n, d] packed, or float[s, b, n, d] plain; n local heads.
            key: like query, with the local key/value heads; in plain form it may be longer, by the cached positions.
            value: like key.
            attention_mask: must be None; `packed_seq_params` separates the samples.
            attn_mask_type: ignored; set at construction.
            attention_bias: must be None.
            packed_seq_params: boundaries of the packed samples, `ContextParams` with context parallelism; None in
                plain form.

        Returns:
            float[t, n * d] packed, float[s, b, n * d] plain.

        Raises:
            ValueError: a mask or bias is given, or the boundaries do not cover the sequence.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedAttention takes sample boundaries (packed_seq_params), not masks or biases")
        if packed_seq_params is None:
            return self._attend_plain(query, key, value)
        if self.cp_group is None:
            return self._attend_packed(query, key, value, packed_seq_params)
        attend = partial(self._attend_packed, params=packed_seq_params)
        key_index = packed_seq_params.key_index  # type: ignore[attr-defined]
        return attend_to_gathered(attend, query, key, value, key_index=key_index, group=self.cp_group)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        if query.is_cuda and query.dtype in _KERNEL_DTYPES:
            return self._attend_at_once(query, key, value, params)
        return self._attend_sample_by_sample(query, key, value, params)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in the layout float[b, n, s, d]; the last query is at the position of the last key."""
        grouped = query.size(1) != key.size(1)
        cached = key.size(2) - query.size(2)
        # torch's is_causal aligns the first query with the first key. A single query after a cache sees every key;
        # several queries see the cache and, among themselves, only earlier positions.
        causal, mask = self.causal and query.size(2) > 1, None
        if causal and cached:
            causal = False
            mask = query.new_ones(query.size(2), key.size(2), dtype=torch.bool).tril(cached)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped
        )

    def _attend_plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_head = [x.permute(1, 2, 0, 3) for x in (query, key, value)]  # [s, b, n, d] -> [b, n, s, d]
        out = self._attend(*by_head).permute(2, 0, 1, 3)
        return out.reshape(query.size(0), query.size(1), -1)

    def _attend_sample_by_sample(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        lengths = params.cu_seqlens_q.diff().tolist()  # on a GPU the host waits here
        if sum(lengths) != query.size(0):
            raise ValueError(f"sample boundaries cover {sum(lengths)} of {query.size(0)} tokens")
        num_keys = lengths if self.cp_group is None else params.cu_seqlens_kv.diff().tolist()
        if query.is_cpu and query.dtype in _BLOCK_DTYPES:
            out = attend_by_blocks(
                query, key, value, lengths, num_keys=num_keys, scale=self.softmax_scale, causal=self.causal
            )
            return out.flatten(1)
        outputs = []
        for sample in zip(query.split(lengths), key.split(num_keys), value.split(num_keys), strict=True):
            by_head = [x.transpose(0, 1).unsqueeze(0) for x in sample]  # [s, n, d] -> [1, n, s, d]
            outputs.append(self._attend(*by_head).squeeze(0).transpose(0, 1))
        return torch.cat(outputs).reshape(query.size(0), -1)

    def _attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        kernel, accepted = _kernel()
        options: dict[str, Any] = {
            "scale": self.softmax_scale,
            "window_size": (-1, 0) if self.causal else (-1, -1),
            "is_causal": self.causal,
            "enable_gqa": True,
        }
        if "enable_gqa" not in accepted:
            groups = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if "scale" not in accepted:  # the kernel divides the scores by sqrt(d) itself
            query = query * (self.softmax_scale * math.sqrt(query.size(-1)))
        borders = (params.cu_seqlens_q, params.cu_seqlens_kv, params.max_seqlen_q, params.max_seqlen_kv)
        out: Tensor = kernel(
            query, key, value, *borders, **{name: x for name, x in options.items() if name in accepted}
        )
        return out.reshape(out.size(0), -1)


def _context_group(pg_collection: ProcessGroupCollection | None, causal: bool) -> torch.distributed.ProcessGroup:
    if pg_collection is None or not causal:
        raise ValueError("context parallelism needs causal attention and megatron-core's process groups")
    return pg_collection.cp


@functools.cache
def _kernel() -> tuple[Callable[..., Any], frozenset[str]]:
    """Return torch's variable-length attention and the names of its arguments.

    torch 2.10 takes `is_causal`; later versions take `window_size` and `scale` in its place, and `enable_gqa` from 2.13
    on.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)
