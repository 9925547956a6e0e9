"""Real processes for distributed tests: started once a session, given jobs of any world size up to their number."""

import importlib
import multiprocessing
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any


class WorkerPool:
    """`size` processes that run a function of a module as the ranks of a gloo job."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: str, world_size: int, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        """Run `module:function` on ranks 0 to world_size - 1 and return what each returned; raises what one raised."""
        with tempfile.TemporaryDirectory() as folder:
            ranks = self._pipes[:world_size]
            for rank, pipe in enumerate(ranks):
                pipe.send((job, arguments, rank, world_size, f"{folder}/store"))
            answers = []
            for rank, pipe in enumerate(ranks):
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} of {job} gave no answer in {timeout:.0f} s")
                answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if not answer[0]]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answer[1] for answer in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(10)


def _work(pipe: Connection) -> None:
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    import torch

    from megatron_vlm.parallel.groups import stop_distributed

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
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            stop_distributed()
        pipe.send(answer)
