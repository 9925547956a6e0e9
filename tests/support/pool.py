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

# Imports take most of it; on a machine with much other work, minutes.
START_SECONDS = 900.0


class WorkerPool:
    """`size` processes that run a function of a module as the ranks of a gloo job.

    Args:
        size: of the largest job.
        setup: `module:function` that each process calls before it imports megatron-core.
    """

    def __init__(self, size: int, setup: str = "megatron_vlm.platform.device:prepare_process") -> None:
        self.size, self.setup = size, setup
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, job: str, world_size: int, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """Run `module:function` on ranks 0 to world_size - 1 and return what each returned.

        Raises:
            RuntimeError: a rank raised or died; the others may wait for it, so that the processes are started anew.
            TimeoutError: a rank gave no answer within `timeout` seconds, which do not count the start of the processes.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._start()
                for rank, pipe in enumerate(self._pipes[:world_size]):
                    pipe.send((job, arguments, rank, world_size, f"{folder}/store"))
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
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                succeeded, answer = _receive(pipe)  # type: ignore[arg-type]
                if not succeeded:
                    raise RuntimeError(f"rank {rank} of {job}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(len(pipes))]

    def _start(self) -> None:
        context, starting = multiprocessing.get_context("spawn"), []
        while len(self._processes) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid(), self.setup))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
            starting.append(ours)
        self._collect("start", starting, time.monotonic() + START_SECONDS)

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


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process died"


def _find(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _work(pipe: Connection, parent_pid: int, setup: str) -> None:
    from megatron_vlm.platform.launch.parent import die_with_parent

    os.setpgid(0, 0)
    die_with_parent(parent_pid)
    faulthandler.register(signal.SIGUSR2)
    _find(setup)()
    import torch

    from megatron_vlm.parallel.groups import stop_distributed
    from tests.support.release import release_models

    # What nearly every job needs; imported here, it does not count as time of the first one.
    importlib.import_module("tests.support.jobs")
    torch.set_num_threads(1)
    pipe.send((True, None))
    while True:
        try:
            job, arguments, rank, world_size, store_path = pipe.recv()
        except EOFError:
            return
        try:
            store = torch.distributed.FileStore(store_path, world_size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            # A job may end without a collective; its rank must not hang up while another still connects to it.
            torch.distributed.barrier()
            answer = (True, _find(job)(**arguments))
            stop_distributed()
            release_models()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
