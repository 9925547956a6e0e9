"""Finish the gradients of a global batch without a decision on the host."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_vlm.platform.step_phases import StepPhase, phase

_PIECE_SIZE = 1 << 24
"""Gradients that are averaged together, if they are small [elements]."""


@phase(StepPhase.GRADIENT_REDUCTION)
def finish_gradients(model: Sequence[DistributedDataParallel], num_labels: Tensor | None, **options: Any) -> None:
    """Reduce the gradients over the ranks and divide them by the labels of the global batch.

    The schedules call it behind the last backward pass. The reductions are megatron-core's, but for that of the vision
    parts; its own division reads on the host whether there are labels, which makes the host wait for the whole batch.

    Args:
        model: the chunks of this rank; their gradients change in place. Without a label on any rank they stay as they
            are.
        num_labels: int[]; of this rank's micro-batches, on the last stage; None: no division.
        **options: of megatron-core's `finalize_model_grads`.
    """
    finalize_model_grads(list(model), None, **options)
    average_replicas(model)
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


def average_replicas(model: Sequence[torch.nn.Module]) -> None:
    """Average the gradients of what every tensor-parallel rank holds whole, as `mark_replicated` marks it.

    megatron-core copies all of them into one tensor first, which for a tower of six billion parameters takes more
    memory than the activations. Here they stay where they are, and only small ones are copied together.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for piece in _pieces(model):
        if len(piece) == 1:
            torch.distributed.all_reduce(piece[0], op=torch.distributed.ReduceOp.AVG, group=group)
            continue
        together = torch.cat([grad.flatten() for grad in piece])
        torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.AVG, group=group)
        for grad, average in zip(piece, together.split([grad.numel() for grad in piece]), strict=True):
            grad.copy_(average.view_as(grad))


def _pieces(model: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Yield the gradients to average: one large one, or small ones up to _PIECE_SIZE; the same on every rank."""
    small: list[Tensor] = []
    for chunk in model:
        for parameter in chunk.parameters():
            if not parameter.requires_grad or not getattr(parameter, "is_replicated", False):
                continue
            grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            if grad.numel() >= _PIECE_SIZE:
                yield [grad]
                continue
            if sum(one.numel() for one in small) + grad.numel() > _PIECE_SIZE:
                yield small
                small = []
            small.append(grad)
    if small:
        yield small
