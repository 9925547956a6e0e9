"""Files whose reading gives signs of life: a checkpoint may take longer to read than a rank may be silent."""

import io
from pathlib import Path
from typing import Any, cast

from megatron_vlm.platform.launch.heartbeat import beat

_READ_BYTES = 1 << 24
"""Read at a time, so that even one large tensor from a slow disk is a sign of life now and then."""


class WatchedPath(type(Path())):  # type: ignore[misc]
    """A path; so are those made from it. torch's reader of checkpoints opens its files by `open`."""

    def open(self, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        """Open the file; opened as "rb", each part that is read gives a sign of life."""
        if mode != "rb":
            return super().open(mode, *arguments, **named)
        return io.BufferedReader(cast(io.RawIOBase, _WatchedFile(self)))


class _WatchedFile(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(memoryview(buffer)[:_READ_BYTES])
        beat()
        return count
