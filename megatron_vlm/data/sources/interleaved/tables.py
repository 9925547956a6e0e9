"""Interleaved documents in parquet, one per row, as OBELICS, OmniCorpus and MINT-1T publish them."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet

from megatron_vlm.config import DataError
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.documents import Document, Image, Text
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.parquet import open_parquet, read_rows
from megatron_vlm.data.files.records import field, parse_record
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.interleaved.documents import pair_up, placed_document
from megatron_vlm.data.sources.source import Found, key_of, read_each

_KEY_COLUMNS = ("url", "id", "key", "__key__")
_METADATA = "general_metadata"
_WANTED = ("texts", "images")


@dataclass(frozen=True, slots=True)
class InterleavedTableSource:
    """Parquet tables with two columns of lists, `texts` and `images`, of which exactly one has an entry at each place.

    An image is a URL or a file name, found through --images; or the file itself, as bytes or as `{bytes, path}`. The
    key of a row is its `url`, `id` or `key`, or the `url` inside of `general_metadata`, which is JSON.

    Source: HuggingFaceM4/OBELICS, dataset card.
    """

    inputs: tuple[Location, ...]
    rules: InterleavedRules = InterleavedRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the documents of one table."""
        try:
            table = open_parquet(path, streamed=True)
        except DataError as error:
            yield Found(None, None, RejectError("file_truncated", error.what))
            return
        with table:
            if missing := _missing_columns(table):
                yield Found(None, None, RejectError("column_missing", f"no column {' and '.join(missing)}"))
                return
            columns = [name for name in (*_WANTED, *_KEY_COLUMNS, _METADATA) if name in table.schema_arrow.names]
            make = functools.partial(self._document, images=images)
            yield from read_each(read_rows(table, columns), _key, make)

    def _document(self, cells: dict[str, Any], key: str, images: ImageReader) -> Document:
        found = pair_up(field(cells, "texts", list), field(cells, "images", list))
        places = [place if isinstance(place, Text) else functools.partial(_load, place, images) for place in found]
        return placed_document(places, key, self.rules, images)


def check_first_table(path: Location) -> None:
    """Raise a DataError if the table cannot be read or has other columns, before anything is prepared."""
    with open_parquet(path) as table:
        if missing := _missing_columns(table):
            raise DataError(
                f"parquet file has no column {' and '.join(missing)}",
                where=str(path),
                fix="use prepare pairs for pairs of one image and one caption",
            )


def _missing_columns(table: pyarrow.parquet.ParquetFile) -> list[str]:
    return [name for name in _WANTED if name not in table.schema_arrow.names]


def _key(cells: dict[str, Any]) -> str | None:
    for name in _KEY_COLUMNS:
        if (key := key_of(cells.get(name))) is not None:
            return key
    metadata = cells.get(_METADATA)
    if not isinstance(metadata, str):
        return None
    try:
        return key_of(parse_record(metadata.encode()).get("url"))
    except RejectError:
        return None  # a row does not need its URL


def _load(image: Any, images: ImageReader) -> Image:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return images.check(image)
    if not isinstance(image, str):
        raise RejectError("json_type", f"an image is {type(image).__name__}, not a URL or the file")
    return images.find(None, image) if "://" in image else images.find(image)
