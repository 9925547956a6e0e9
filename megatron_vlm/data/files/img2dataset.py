"""The parquet table that img2dataset writes beside each of its tars: key, URL, caption and status of every image."""

from typing import Any

from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.parquet import open_parquet

_SHARD_COLUMNS = ("key", "url", "caption", "status", "error_message")


def read_shard_table(path: Location) -> dict[str, dict[str, Any]]:
    """Return the rows of the table beside a tar, by key; an empty dict if there is no such table."""
    if not is_shard_table(path):
        return {}
    with open_parquet(path) as table:
        columns = [name for name in _SHARD_COLUMNS if name in table.schema_arrow.names]
        return {str(row["key"]): row for row in table.read(columns=columns).to_pylist()}


def is_shard_table(path: Location) -> bool:
    """Tell whether a parquet file is the one that img2dataset writes beside the tar of the same name."""
    if not path.is_file() or not beside(path, ".tar").is_file():
        return False
    with open_parquet(path) as table:
        return "key" in table.schema_arrow.names


def beside(path: Location, suffix: str) -> Location:
    """Return the file of the same name with another suffix, in capitals if the suffix of `path` is."""
    return path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)
