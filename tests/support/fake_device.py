"""A process on the fake device, for all tests of it: a process cannot leave it again."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


class FakeDeviceProcess:
    """Runs functions, importable by name, one after the other."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
        )

    def run(self, function: Callable, *arguments: Any, **settings: Any) -> Any:
        """Return what the function returns there; raises what it raises."""
        return self._pool.submit(function, *arguments, **settings).result(timeout=300)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start(parent: int) -> None:
    from megatron_vlm.platform.fake_device.guard import load_guard
    from megatron_vlm.platform.launch.parent import die_with_parent

    die_with_parent(parent)
    load_guard()
    from megatron_vlm.platform.fake_device.device import install

    install()
