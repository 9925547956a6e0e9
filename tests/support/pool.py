"""Real processes for distributed tests: started once a session, given jobs of any world size up to their number."""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerPool:
    """`size` processes that run a function of a module as the ranks of a gloo job."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, job: str, world_size: int, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """Run `module:function` on ranks 0 to world_size - 1 and return what each returned.

        Raises:
            RuntimeError: a rank raised; the others may wait for it for ever, so that the processes are started anew.
            TimeoutError: a rank gave no answer.
        """
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self._pipes[:world_size]):
                pipe.send((job, arguments, rank, world_size, f"{folder}/store"))
            try:
                return self._collect(job, self._pipes[:world_size], time.monotonic() + timeout)
            except BaseException:
                self.close()
                raise

    def _collect(self, job: str, pipes: list[Connection], deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < len(pipes):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(answers))} of {job} gave no answer")
            for pipe in ready:
                succeeded, answer = pipe.recv()  # type: ignore[union-attr]
                if not succeeded:
                    raise RuntimeError(f"rank {pipes.index(pipe)} of {job}:\n{answer}")  # type: ignore[arg-type]
                answers[pipes.index(pipe)] = answer  # type: ignore[arg-type]
        return [answers[rank] for rank in range(len(pipes))]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid()))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            # The whole group: megatron-core starts a helper process at the first save.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join(10)
        self._pipes, self._processes = [], []


def _work(pipe: Connection, parent_pid: int) -> None:
    from megatron_vlm.platform.device import prepare_process
    from megatron_vlm.platform.launch.parent import die_with_parent

    os.setpgid(0, 0)
    die_with_parent(parent_pid)
    faulthandler.register(signal.SIGUSR2)
    prepare_process()
    import torch

    from megatron_vlm.parallel.groups import stop_distributed
    from tests.support.release import release_models

    torch.set_num_threads(1)
    while True:
        try:
            job, arguments, rank, world_size, store_path = pipe.recv()
        except EOFError:
            return
        try:
            store = torch.distributed.FileStore(store_path, world_size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            module, name = job.split(":")
            answer = (True, getattr(importlib.import_module(module), name)(**arguments))
            stop_distributed()
            release_models()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
