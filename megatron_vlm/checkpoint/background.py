"""Save checkpoints while the run goes on: values are copied, then a thread of each rank writes the copies.

A thread, not a process: it cannot outlive its rank, shares no memory by accident, and needs no second copy of the
program. torch and zlib compute and write without Python's lock. megatron-core's asynchronous writer forks processes,
which a killed rank leaves behind, and on a host without a GPU may write the values of a later step.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.checkpoint.manifest import Base
from megatron_vlm.checkpoint.save import PreparedSave, prepare_save, write_save
from megatron_vlm.config import TrainConfig
from megatron_vlm.platform.launch.heartbeat import beat

_SECONDS_TO_WRITE = timedelta(hours=1)
"""How long the writers of a rank wait for one that does not get on; they notice a rank that died at once."""
_LOOK_SECONDS = 1.0


class Staging:
    """Host memory for copies of what this rank saves, kept from save to save: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def copy(self, tensors: list[ShardedTensor]) -> None:
        """Replace the data of `tensors` by copies; the device may still compute when this is called."""
        for tensor in tensors:
            values = tensor.data.detach()
            place = (tensor.key, tensor.global_offset, values.shape, values.dtype)
            if place not in self._buffers:
                # Page-locked memory: the device writes to it directly.
                self._buffers[place] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[place].copy_(values, non_blocking=True)
            tensor.data = self._buffers[place]
        torch.cuda.synchronize()


class BackgroundSaves:
    """At most one save in flight. All ranks of the job make one, and call each method, together.

    While steps go on, the writer gives no sign of life: it would stand for a main thread that hangs. Where the main
    thread waits for the writer, it gives one whenever the writer has got on.
    """

    def __init__(self) -> None:
        # A thread must not share a group with the steps: their collectives would mix.
        self._between_writers = torch.distributed.new_group(backend="gloo", timeout=_SECONDS_TO_WRITE)
        self._between_ranks = torch.distributed.new_group(backend="gloo")
        self._staging = Staging()
        self._signs = 0
        """Of the writer."""
        self._thread: Thread | None = None
        self._outcome: Path | BaseException | None = None

    def start(
        self,
        config: TrainConfig,
        chunks: Sequence[MegatronModule],
        optimizer: MegatronOptimizer,
        progress: dict[str, Any],
        base: Base | None = None,
    ) -> None:
        """Copy the values and start to save them. Arguments are those of `save_checkpoint`.

        Raises:
            RuntimeError: a save is in flight.
        """
        if self._thread is not None:
            raise RuntimeError("a save is in flight")
        save = prepare_save(config, chunks, optimizer, progress, base, self._staging.copy)
        self._thread = Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, save: PreparedSave) -> None:
        try:
            self._outcome = write_save(save, self._between_writers, self._note_sign)
        except BaseException as error:  # `wait` raises it
            self._outcome = error

    def _note_sign(self) -> None:
        self._signs += 1

    def poll(self) -> Path | None:
        """Return what `wait` returns if the save in flight has ended on all ranks, otherwise None; does not block."""
        if self._thread is None:
            return None
        has_ended = torch.tensor(int(not self._thread.is_alive()))
        torch.distributed.all_reduce(has_ended, op=torch.distributed.ReduceOp.MIN, group=self._between_ranks)
        return self.wait() if has_ended else None

    def wait(self) -> Path | None:
        """Wait for the save in flight and return its folder; None if there is none.

        Raises:
            StorageError: as for `save_checkpoint`.
            NumericError: as for `save_checkpoint`.
        """
        if self._thread is None:
            return None
        seen = self._signs
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            if self._signs != seen:
                seen = self._signs
                beat()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
