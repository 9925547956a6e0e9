"""Attention over several context-parallel ranks is that of one, and keeps no keys of other ranks."""

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.layers.attention import PackedAttention
from megatron_vlm.models.layers.context_parallel import ContextParams, _GatheredAgain
from megatron_vlm.parallel.groups import build_groups, rank_layout
from megatron_vlm.parallel.slicing import PackedBatch, slice_batch

pytestmark = pytest.mark.distributed

# One over all chunks, many in a chunk, one of a single position; 4 ranks have chunks of 20.
LENGTHS = (70, 7, 1, 30, 52)
HEADS, GROUPS, CHANNELS = 4, 2, 8


def _attention(size):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        context_parallel_size=size,
    )
    groups = ProcessGroupCollection(cp=parallel_state.get_context_parallel_group())
    return PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def _whole_batch():
    empty, total = np.empty(0, dtype=np.int64), sum(LENGTHS)
    return PackedBatch(
        input_ids=np.arange(total),
        labels=np.arange(total),
        cu_seqlens=np.cumsum([0, *LENGTHS], dtype=np.int32),
        label_index=empty,
        label_datasets=empty,
        image_token_index=empty,
        num_images=0,
        images=[],
    )


def attend(dtype: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return output and gradients of the positions of this rank, each with what one rank computes for them."""
    size = torch.distributed.get_world_size()
    build_groups(ParallelConfig(context_parallel_size=size))
    generator = torch.Generator().manual_seed(5)
    shapes = [(sum(LENGTHS), heads, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    whole = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
    weights = torch.randn(sum(LENGTHS), HEADS * CHANNELS, generator=generator)
    batch = _whole_batch()
    borders = torch.from_numpy(batch.cu_seqlens)
    alone = _attention(1)(*whole, None, packed_seq_params=PackedSeqParams(cu_seqlens_q=borders, cu_seqlens_kv=borders))
    (alone * weights).sum().backward()

    part = slice_batch(batch, None, rank_layout().context_share)
    mine = torch.from_numpy(part.input_ids)
    local = [x.detach()[mine].requires_grad_() for x in whole]
    params = ContextParams(
        cu_seqlens_q=torch.from_numpy(part.cu_seqlens),
        cu_seqlens_kv=torch.from_numpy(part.context.key_cu_seqlens),
        position_ids=torch.from_numpy(part.context.position_ids),
        key_index=torch.from_numpy(part.context.key_index),
    )
    together = _attention(size)(*local, None, packed_seq_params=params)
    (together * weights[mine]).sum().backward()
    pairs = [(together, alone[mine]), *((x.grad, y.grad[mine]) for x, y in zip(local, whole, strict=True))]
    return [(ours.detach().float(), theirs.detach().float()) for ours, theirs in pairs]


@pytest.mark.parametrize(("world_size", "dtype"), [(2, "float32"), (4, "float32"), (2, "bfloat16")])
def test_every_position_attends_as_on_one_rank_and_gets_the_same_gradients(workers, world_size, dtype):
    # bfloat16: torch's kernel, and sums over two ranks that are rounded to 8 bits.
    rtol, atol = (1e-5, 1e-5) if dtype == "float32" else (2e-2, 6e-2)
    for pairs in workers.run("tests.models.layers.test_context_parallel:attend", world_size, dtype=dtype):
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_views_of_what_is_gathered_are_not_kept_and_made_again_once_a_pass():
    whole, made = torch.arange(12.0).view(3, 4), []

    def compute():
        made.append(whole.clone())
        return made[-1]

    kept, other = _GatheredAgain(whole[:, :2], compute), torch.ones(2)
    packed = [kept.pack(whole[:, :2]), kept.pack(whole[:, 2:]), kept.pack(other)]
    assert [isinstance(one, torch.Tensor) for one in packed] == [False, False, True]
    for number in (1, 2):  # a second pass over a graph that is retained
        first, second, third = map(kept.unpack, packed)
        assert first.equal(whole[:, :2])
        assert second.equal(whole[:, 2:])
        assert third is other
        assert len(made) == number
        assert kept._again is None


def test_settings_without_positions_are_refused():
    with pytest.raises(ValueError, match="ContextParams needs position_ids and key_index"):
        ContextParams(qkv_format="thd")
