"""LoRA beside the linear layers of the decoder, for torch's layers and transformer-engine's.

The pair (A, B) of a matrix hangs at the decoder layer; a hook of the linear layer adds its product to the output. Of a
column-parallel layer, every tensor-parallel rank has all of A and the rows of B that belong to its outputs. Of a
row-parallel layer, it has the columns of A that belong to its inputs and all of B, whose product is added after the
ranks' outputs have been summed: before, it would count once for every rank. What travels between the ranks is always
A x, as many numbers a token as the rank of the pair.

Source: Hu et al., arXiv:2106.09685, section 4.1.
"""

import hashlib
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vlm.config.adapters.lora import COLUMN_PARALLEL, TARGETS, Config, Target
from megatron_vlm.models.vlm import VisionLanguageModel

ProcessGroup = torch.distributed.ProcessGroup


def apply(config: Config, model: VisionLanguageModel) -> None:
    """Add the pairs to every decoder layer of this chunk."""
    for layer in model.language_model.decoder.layers:
        layer.lora = LayerPairs(config, layer, model.tp_group)


def start(config: Config, model: VisionLanguageModel) -> None:
    """Leave the base as it is: B is zero."""


class LayerPairs(MegatronModule):
    """The pairs of one decoder layer, by the names of the linear layers.

    Args:
        config: settings of the adapter.
        layer: the decoder layer; its linear layers get hooks.
        group: the tensor-parallel ranks.
    """

    def __init__(self, config: Config, layer: TransformerLayer, group: ProcessGroup) -> None:
        super().__init__(config=layer.config)
        self.tp_group = group
        for target in TARGETS:
            if target in config.targets:
                linear: Any = _find_linear(layer, target)
                seed = _seed_of(layer.layer_number, target)
                pair_type = ColumnPair if target in COLUMN_PARALLEL else RowPair
                pair = pair_type(config, layer.config, linear.weight, group, target=target, seed=seed)
                self.add_module(target, pair)
                _hook(linear, pair)


class _Pair(MegatronModule):
    """A and B of one linear layer; `a` is float[rank, inputs], `b` is float[outputs, rank], both local.

    Args:
        config: settings of the adapter.
        megatron: settings of the decoder.
        weight: of the linear layer, float[outputs, inputs], local.
        group: the tensor-parallel ranks.
        target: name of the linear layer.
        seed: of A.
    """

    SPLIT_A: bool
    """Whether the ranks split A; otherwise they split B."""

    def __init__(
        self,
        config: Config,
        megatron: TransformerConfig,
        weight: Tensor,
        group: ProcessGroup,
        *,
        target: Target,
        seed: int,
    ) -> None:
        super().__init__(config=megatron)
        self.tp_group, self.scale, self.dropout = group, config.scale, config.dropout
        self.is_gated = target == "linear_fc1" and megatron.gated_linear_unit
        outputs, inputs = weight.shape
        a = _draw(config.rank_of(target), inputs * (group.size() if self.SPLIT_A else 1), seed)
        if self.SPLIT_A:
            a = a.chunk(group.size(), dim=1)[group.rank()]
        self.a = torch.nn.Parameter(a.to(megatron.params_dtype).contiguous())
        self.b = torch.nn.Parameter(torch.zeros(outputs, a.size(0), dtype=megatron.params_dtype))
        for weight_, is_split, axis in ((self.a, self.SPLIT_A, 1), (self.b, not self.SPLIT_A, 0)):
            set_tensor_model_parallel_attributes(weight_, is_split, axis if is_split else -1, 1)
            # Each rank sees other tokens with what is whole on every rank, so their gradients must be summed.
            setattr(weight_, "sequence_parallel", megatron.sequence_parallel and not is_split)  # noqa: B010

    def _drop(self, x: Tensor, *, is_split: bool) -> Tensor:
        """Apply dropout; ranks that hold parts of one tensor draw different numbers, replicas the same ones."""
        if not (self.training and self.dropout):
            return x
        with get_cuda_rng_tracker().fork() if is_split else nullcontext():
            return F.dropout(x, self.dropout)

    def _add(self, output: Tensor, z: Tensor) -> Tensor:
        """Return output + scale * B z in one pass over the output."""
        rows = torch.addmm(output.flatten(0, -2), z.flatten(0, -2), self.b.t(), alpha=self.scale)
        return rows.view(output.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"a": 1} if self.SPLIT_A else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        if self.is_gated:
            # A rank has rows of the gate and of the up projection; the checkpoint has all of the one, then the other.
            sharded[f"{prefix}b"] = apply_swiglu_sharded_factory(sharded[f"{prefix}b"], sharded_offsets)
        return sharded


class ColumnPair(_Pair):
    """The pair of a column-parallel layer: A is whole, B is split."""

    SPLIT_A = False

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the product of the pair.

        Args:
            x: float[s, b, h], the input of the linear layer; with sequence parallelism float[s / tp, b, h].
            output: float[s, b, outputs], of the linear layer on this rank.
        """
        split = self.config.sequence_parallel
        z = F.linear(self._drop(x, is_split=split), self.a)
        if split:
            z = gather_from_sequence_parallel_region(z, group=self.tp_group)
        else:
            z = copy_to_tensor_model_parallel_region(z, group=self.tp_group)
        return self._add(output, z)


class RowPair(_Pair):
    """The pair of a row-parallel layer: A is split, B is whole."""

    SPLIT_A = True

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the product of the pair.

        Args:
            x: float[s, b, inputs], the input of the linear layer on this rank.
            output: float[s, b, h], summed over the ranks; with sequence parallelism this rank's, float[s / tp, b, h].
        """
        z = F.linear(self._drop(x, is_split=True), self.a)
        if self.config.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        else:
            z = reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        return self._add(output, z)


def _find_linear(layer: TransformerLayer, target: Target) -> torch.nn.Module:
    holder = layer.self_attention if target in ("linear_qkv", "linear_proj") else layer.mlp
    return getattr(holder, target)


def _seed_of(layer_number: int, target: Target) -> int:
    """Return a seed that depends on the run's seed and on the place of the pair only, not on the layout."""
    text = f"{torch.initial_seed()} {layer_number} {target}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _draw(rank: int, inputs: int, seed: int) -> Tensor:
    """Return the whole A, drawn by torch's kaiming_uniform_ with a = sqrt(5), as torch draws linear layers."""
    a = torch.empty(rank, inputs, device="cpu")
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator("cpu").manual_seed(seed))
    return a


def _hook(linear: Any, pair: _Pair) -> None:
    if hasattr(linear, "return_layernorm_output"):
        # transformer-engine's norm and linear layer in one: the pair needs what is between the two.
        linear.return_layernorm_output = True
    linear.register_forward_hook(partial(_add_pair, pair))


def _add_pair(pair: _Pair, linear: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple[Tensor, Tensor | None]:
    x, (output, bias) = inputs[0], outputs
    if isinstance(output, tuple):
        output, x = output
    return pair(x, output), bias
