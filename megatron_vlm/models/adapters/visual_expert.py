"""A visual expert in every decoder layer, for torch's layers and transformer-engine's.

Both sides compute only their own positions: the rows of the sequence are split by kind before the matrices of a layer
and joined behind them. Attention, norms and embeddings are those of the decoder. Where a micro-batch has no image, the
decoder's own modules run, so that text alone gives the bits of the decoder.

With tensor parallelism, each matrix is split like the original. The split by kind needs all rows, so that sequence
parallelism gathers them first; the partial sums of both sides are joined before the one reduction behind them.

Source: CogVLM, arXiv:2311.03079, section 2.1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vlm.config import ConfigError
from megatron_vlm.config.adapters.visual_expert import WEIGHTS, Config
from megatron_vlm.models.layers.linear import local_product, without_gradient
from megatron_vlm.models.layers.mlp import swiglu
from megatron_vlm.models.layers.row_kinds import RowKinds
from megatron_vlm.models.vlm import VisionLanguageModel

Forward = Callable[..., tuple[Tensor, Tensor | None]]
ProcessGroup = torch.distributed.ProcessGroup
_SPLIT_AXES = {"linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1}


def apply(config: Config, model: VisionLanguageModel) -> None:
    """Add an expert to every decoder layer of this chunk.

    Raises:
        ConfigError: the decoder computes in FP8, whose products need multiples of 16 rows.
    """
    if model.config.fp8:
        raise ConfigError("adapter visual_expert cannot compute in FP8", where="training.fp8", fix="remove one of them")
    model.language_model.sorts_rows = True
    for layer in model.language_model.decoder.layers:
        layer.expert = Expert(layer, model.tp_group)
        layer.__class__ = ExpertLayer


def start(config: Config, model: VisionLanguageModel) -> None:
    """Let the experts begin as copies of the decoder."""
    for layer in model.language_model.decoder.layers:
        layer.expert.copy_from(layer)


class ExpertLayer(TransformerLayer):
    """A decoder layer with an expert; takes the kinds of the rows as its `attention_bias`, which has no other use."""

    expert: "Expert"

    def forward(self, *args: Any, attention_bias: RowKinds | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run the layer; see megatron-core's `TransformerLayer.forward`."""
        # An argument of this call and no state of the micro-batch: recomputation may run beside another one.
        self.expert(attention_bias)
        try:
            hidden_states, context = super().forward(*args, **kwargs)
        finally:
            self.expert.rows = None
        return hidden_states, context


class Expert(MegatronModule):
    """The matrices of one layer for image positions: the local part of each, like the original's.

    Args:
        layer: the decoder layer, whose linear modules and MLP are routed through the expert.
        group: the tensor-parallel ranks.
    """

    def __init__(self, layer: TransformerLayer, group: ProcessGroup) -> None:
        super().__init__(config=layer.config)
        self.tp_group = group
        self.rows: RowKinds | None = None
        for name, original in _originals(layer).items():
            weight = torch.nn.Parameter(original.detach().clone())
            set_tensor_model_parallel_attributes(weight, True, _SPLIT_AXES[name], 1)
            self.register_parameter(name, weight)
        attention, mlp = layer.self_attention, layer.mlp
        for module, forward in (
            (attention.linear_qkv, self._column),
            (attention.linear_proj, self._row),
            (mlp, self._mlp),
        ):
            module.forward = partial(forward, module, module.forward)

    def forward(self, rows: RowKinds | None) -> None:
        """Take the kinds of the rows for the calls that follow; None: all are text.

        It is called, not set: megatron-core gathers the weights of a module when the module is called.
        """
        self.rows = rows

    @torch.no_grad()
    def copy_from(self, layer: TransformerLayer) -> None:
        """Copy the weights of the original matrices."""
        for name, original in _originals(layer).items():
            getattr(self, name).copy_(original)

    def _column(self, linear: Any, original: Forward, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values of float[s, b, h]; with sequence parallelism of float[s / tp, b, h]."""
        if self.rows is None:
            return self._unused(original(x), self.linear_qkv)
        text, image = self._enter(linear, x, self.rows)
        joined = self.rows.join(local_product(text, linear.weight), local_product(image, self.linear_qkv))
        return joined.view(-1, x.size(1), joined.size(1)), None

    def _row(self, linear: Any, original: Forward, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output of attention, float[s, b, n * d / tp]."""
        if self.rows is None:
            return self._unused(original(x), self.linear_proj)
        text, image = self.rows.split(x.flatten(0, 1))
        joined = self.rows.join(local_product(text, linear.weight), local_product(image, self.linear_proj))
        return self._leave(joined, x.size(1)), None

    def _mlp(self, mlp: Any, original: Forward, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        if self.rows is None:
            return self._unused(original(x, **options), self.linear_fc1, self.linear_fc2)
        text, image = self._enter(mlp.linear_fc1, x, self.rows)
        outputs = (
            local_product(swiglu(local_product(rows, first)), second)
            for rows, first, second in (
                (text, mlp.linear_fc1.weight, mlp.linear_fc2.weight),
                (image, self.linear_fc1, self.linear_fc2),
            )
        )
        return self._leave(self.rows.join(*outputs), x.size(1)), None

    def _unused(self, result: tuple[Tensor, Tensor | None], *weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the result of the original, and give weights gradients of zero in the order in which they get others.

        Each rank must reduce the same gradients in one order, whether or not its rows have an image.
        """
        output, bias = result
        if torch.is_grad_enabled():
            for weight in weights:
                output = without_gradient(output, weight)
        return output, bias

    def _enter(self, linear: Any, x: Tensor, rows: RowKinds) -> tuple[Tensor, Tensor]:
        """Return text and image rows of the whole sequence, normed; their gradients will be summed over the ranks."""
        norm = getattr(linear, "layer_norm_weight", None)
        if norm is not None:  # transformer-engine's linear layer norms its input itself
            x = F.rms_norm(x, (x.size(-1),), norm, self.config.layernorm_epsilon)
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x)
        else:
            x = copy_to_tensor_model_parallel_region(x)
        return rows.split(x.flatten(0, 1))

    def _leave(self, partial_sums: Tensor, batch_size: int) -> Tensor:
        """Sum float[s * b, h] over the ranks; returns float[s, b, h], or the slice of this rank."""
        x = partial_sums.view(-1, batch_size, partial_sums.size(1))
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x)
        return reduce_from_tensor_model_parallel_region(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state for a checkpoint, which any tensor-parallel size can read."""
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            _SPLIT_AXES,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        # A rank has rows of the gate and of the up projection; the checkpoint has all of the one, then the other.
        key = f"{prefix}linear_fc1"
        sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        return sharded


def _originals(layer: TransformerLayer) -> dict[str, Tensor]:
    """Return the weights of the original matrices by the names of the expert's."""
    attention, mlp = layer.self_attention, layer.mlp
    modules = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    return {name: module.weight for name, module in zip(WEIGHTS, modules, strict=True)}
