"""Opens parquet files, here or at a URL, so that memory does not grow with them."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_vlm.config import DataError
from megatron_vlm.data.sources.locations import Location, open_stream

_BUFFER_BYTES = 1 << 20


def open_parquet(path: Location, *, streamed: bool = False) -> pyarrow.parquet.ParquetFile:
    """Open a parquet file.

    Args:
        path: the file.
        streamed: read columns in pieces of a MiB, not whole row groups at once: for columns of pictures, of which one
            row group is often hundreds of MiB.

    Raises:
        DataError: the file is not parquet.
        StorageError: it is at a URL and cannot be read.
    """
    # By pread: a mapped file that is cut short while it is read kills the process.
    options = {"memory_map": False} | ({"buffer_size": _BUFFER_BYTES, "pre_buffer": False} if streamed else {})
    try:
        return pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else open_stream(path), **options)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Location, error: Exception) -> DataError:
    """Return the error of a parquet file that turns out to be damaged."""
    return DataError(
        f"parquet file cannot be read: {' '.join(str(error).split())[:120]}", where=str(path), fix="copy it again"
    )
