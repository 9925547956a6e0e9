"""The protocol of the objectives in `training/objectives/`, and the code they share."""

from typing import Any, Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vlm.config.modules import find_module
from megatron_vlm.config.objectives import ObjectiveConfig
from megatron_vlm.data.loading.batch import VLMBatch
from megatron_vlm.models.layers.context_parallel import ContextParams


class Objective(Protocol):
    """Turns a micro-batch into its loss."""

    def forward(self, model: Any, batch: VLMBatch) -> Tensor:
        """Run a micro-batch through this pipeline stage and return the stage's output."""

    def reduce(self, output: Tensor, batch: VLMBatch, num_datasets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the output of the last stage, as megatron-core's schedules expect it.

        Returns:
            The summed loss (a scalar with gradient), the count that it is divided by over the whole global batch
            (int32), and float64[2, num_datasets] with sums and counts of each dataset, for the log.
        """


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective that the settings name.

    Raises:
        ConfigError: there is no such objective.
    """
    module: Any = find_module("megatron_vlm.training.objectives", config.type, "training.objective.type")
    return module.Objective(config)


def run_model(model: Any, batch: VLMBatch) -> Tensor:
    """Run a micro-batch through a model chunk: the loss of each label on the last stage, hidden states before it."""
    return model(
        batch.input_ids,
        batch.pixel_values,
        batch.image_token_index,
        num_images=batch.num_images,
        labels=batch.labels,
        label_index=batch.label_index,
        packed_seq_params=packed_seq_params(batch),
        image_index=None if batch.context is None else batch.context.image_index,
    )


def packed_seq_params(batch: VLMBatch) -> PackedSeqParams:
    """Return the sample borders of a batch as megatron-core wants them."""
    borders, longest = batch.cu_seqlens, batch.max_seqlen
    if batch.context is not None:
        return ContextParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=batch.context.key_cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=batch.context.max_keys,
            position_ids=batch.context.position_ids,
            key_index=batch.context.key_index,
        )
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )
