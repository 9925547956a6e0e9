"""Finish the gradients of a global batch without a decision on the host."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor


def finish_gradients(model: Sequence[DistributedDataParallel], num_labels: Tensor | None, **options: Any) -> None:
    """Reduce the gradients over the ranks and divide them by the labels of the global batch.

    The schedules call it behind the last backward pass. The reductions are megatron-core's; its own division reads on
    the host whether there are labels, which makes the host wait for the whole batch.

    Args:
        model: the chunks of this rank; their gradients change in place. Without a label on any rank they stay as they
            are.
        num_labels: int[]; of this rank's micro-batches, on the last stage; None: no division.
        **options: of megatron-core's `finalize_model_grads`.
    """
    finalize_model_grads(list(model), None, **options)
    if num_labels is None:
        return
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(num_labels, src=last, group=stages)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if replicas.size() > 1:
        torch.distributed.all_reduce(num_labels, group=replicas)
    scaling = 1.0 / num_labels.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scaling)
