"""Forward passes of transformer-engine's modules, computed by torch on the CPU behind their own signatures.

megatron-core calls the real modules; their parameters, groups and modes decide what is computed here, and a call that
does not fit the signature fails. What the kernels compute is not tested by this.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions import transformer_engine as extension
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, _apply_rotary_pos_emb_thd
from torch import Tensor


def _enter(module: Any, x: Tensor) -> Tensor:
    """Return the input of a column-parallel layer."""
    if module.parallel_mode != "column" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(x, group=module.tp_group)
    return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=module.tp_group)


def _leave(module: Any, x: Tensor) -> Tensor:
    """Return the output of a row-parallel layer."""
    if module.parallel_mode != "row" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(x, group=module.tp_group)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=module.tp_group)


def linear(module: Any, inp: Tensor, **unused: Any) -> Tensor:
    """Compute `te.Linear`."""
    return _leave(module, F.linear(_enter(module, inp), module.weight))


def layer_norm_linear(module: Any, inp: Tensor, **unused: Any) -> Tensor:
    """Compute `te.LayerNormLinear` with an RMSNorm."""
    if module.normalization != "RMSNorm":
        raise ValueError(f"no {module.normalization} here")
    normed = F.rms_norm(inp, (inp.size(-1),), module.layer_norm_weight, module.eps)
    return F.linear(_enter(module, normed), module.weight)


def rms_norm(module: Any, input: Tensor, **unused: Any) -> Tensor:
    """Compute `te.RMSNorm`."""
    return F.rms_norm(input, (input.size(-1),), module.weight, module.eps)


def attention(module: Any, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, **settings: Any) -> Tensor:
    """Compute `te.DotProductAttention` for packed samples, float[t, n, d] to float[t, n * d].

    Raises:
        ValueError: the settings are not those of causal packed samples without padding between them.
    """
    borders = settings["cu_seqlens_q"]
    fits = (
        settings["qkv_format"] == "thd"
        and settings["attn_mask_type"] == "padding_causal"
        and borders.dtype == torch.int32
        and settings["cu_seqlens_kv"] is borders
        and settings["cu_seqlens_q_padded"] is None
        and int(borders.diff().max()) <= settings["max_seqlen_q"] == settings["max_seqlen_kv"]
        and settings["attention_mask"] is None
    )
    if not fits:
        raise ValueError(f"not the arguments of packed causal samples: {settings}")
    lengths = borders.diff().tolist()
    outputs = []
    for sample in zip(*(x.split(lengths) for x in (query_layer, key_layer, value_layer)), strict=True):
        by_head = [x.transpose(0, 1) for x in sample]
        out = F.scaled_dot_product_attention(*by_head, is_causal=True, scale=module.softmax_scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).flatten(1)


def rope(
    t: Tensor, freqs: Tensor, *, tensor_format: str, cu_seqlens: Tensor | None, interleaved: bool, **unused: Any
) -> Tensor:
    """Compute transformer-engine's fused RoPE."""
    if tensor_format == "sbhd":
        return _apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)
    group = parallel_state.get_context_parallel_group()
    return _apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, rotary_interleaved=interleaved, cp_group=group)


def _behind(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        module = arguments.pop("self", None)
        return replacement(module, **arguments) if module is not None else replacement(**arguments)

    return checked


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Put the forward passes into the classes for a while."""
    classes = {
        te.Linear: linear,
        te.LayerNormLinear: layer_norm_linear,
        te.RMSNorm: rms_norm,
        te.DotProductAttention: attention,
    }
    originals = {cls: cls.forward for cls in classes}
    original_rope = extension.apply_rotary_pos_emb
    for cls, forward in classes.items():
        cls.forward = _behind(cls.forward, forward)
    extension.apply_rotary_pos_emb = _behind(original_rope, rope)
    try:
        yield
    finally:
        for cls, forward in originals.items():
            cls.forward = forward
        extension.apply_rotary_pos_emb = original_rope
