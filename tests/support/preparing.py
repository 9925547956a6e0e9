"""What tests of prepared folders have in common: their bytes, parts of a job array, and a stop at any write."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from megatron_vlm.data.prepare.array_task import ArrayTask
from megatron_vlm.data.prepare.run import PrepareJob, prepare

_WRITES = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "link")


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepare_array(job: PrepareJob, count: int) -> list[Path]:
    """Prepare a job in parts and return their folders."""
    tasks = [ArrayTask(index, count) for index in range(1, count + 1)]
    for task in tasks:
        prepare(dataclasses.replace(job, output=task.folder(job.output), array_task=task))
    return [task.folder(job.output) for task in tasks]


class _Killed(BaseException):
    pass


def run_until(moment: int, action: Callable[[], object], monkeypatch) -> bool:
    """Stop dead before the operation of this number that changes the file system; True: it was over before."""
    original = {name: getattr(os, name) for name in _WRITES}
    calls = 0

    def counted(name):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                raise _Killed
            return original[name](*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in original:
            patched.setattr(os, name, counted(name))
        try:
            action()
        except _Killed:
            return False
    return True
