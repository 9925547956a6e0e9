"""megatron-core's gradient buffers for a rank without peers that hold the same weights."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel


class SingleDataParallel(DistributedDataParallel):
    """Leaves out the collectives of a data-parallel group of one rank.

    They would copy all gradients and all weights onto themselves. Nothing may overlap with them, so
    `overlap_grad_reduce` and `overlap_param_gather` must be off.
    """

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Do nothing: the rank has all weights."""

    def start_grad_sync(self, *unused: Any) -> None:
        """Do nothing: the gradients of the rank are all there are."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Do nothing, as `start_grad_sync`."""
