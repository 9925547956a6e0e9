"""COYO-like corpora: an image and its caption."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config.sources.pairs import Options, PairRules
from megatron_vlm.data.documents import Document, Image, Text, clean_text
from megatron_vlm.data.files.img2dataset import beside, is_shard_table, read_shard_table
from megatron_vlm.data.files.inputs import TABLE_SUFFIX, check_each_used, find_record_files, is_table, list_inputs
from megatron_vlm.data.files.locations import Location, check_suffixes
from megatron_vlm.data.files.records import SUFFIXES, field, read_records
from megatron_vlm.data.files.tars import find_image
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.source import Found, key_of, read_each
from megatron_vlm.data.sources.tar_samples import TarSample, read_samples
from megatron_vlm.data.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_IMAGE_FIELDS = ("image", "image_name", "file_name", "image_path", "path")
_CAPTION_FIELDS = ("caption", "text", "txt")
_TAR_SUFFIX = ".tar"
_STATISTICS_ENDING = "_stats.json"
"""End of the names of other files that img2dataset writes beside its tars."""


def make_pair(image: Image, caption: str, key: str, rules: PairRules) -> Document:
    """Return the document: the image, then its caption.

    Raises:
        RejectError: the caption is empty or not accepted.
    """
    caption = clean_text(caption, rules.text)
    if not caption.strip():
        raise RejectError("empty_text", "the caption is empty")
    return Document((image, Text(caption)), key=key)


@dataclass(frozen=True, slots=True)
class TarPairSource:
    """Tars as img2dataset writes them: for each key an image, and a caption in .txt, in .json or in the tar's table.

    The table is the parquet file of the same name beside the tar; its rows without an image become rejects with the
    reason that img2dataset gives. Files belong together by their names, in whatever order the tar has them.
    """

    inputs: tuple[Location, ...]
    rules: PairRules = PairRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the pairs of one tar."""
        rows = read_shard_table(beside(path, TABLE_SUFFIX))
        missing = dict(rows)

        def make(sample: TarSample) -> Document:
            row_key = _row_key(sample.key, rows)
            if row_key in rows and row_key not in missing:
                raise RejectError("duplicate_name", f"the tar has two samples for row {row_key} of its table")
            return self._pair(sample, rows.get(row_key, {}), images)

        for found in read_samples(path, make):
            missing.pop(_row_key(found.key, rows), None)
            yield found
        for key, row in missing.items():
            status = row.get("error_message") or row.get("status")
            yield Found(None, key, RejectError("image_missing", f"the tar has no image; img2dataset says {status}"))

    def _pair(self, sample: TarSample, row: dict[str, Any], images: ImageReader) -> Document:
        caption = self._caption(sample, row)
        member = find_image(dict(sample.files))
        if member is None:
            raise RejectError("image_missing", f"the key has {', '.join(sample.files) or 'nothing'}"[:200])
        image = images.check(sample.tar.read(member, images.max_bytes, "image_bytes"))
        return make_pair(image, caption, sample.key, self.rules)

    def _caption(self, sample: TarSample, row: dict[str, Any]) -> str:
        if text := sample.files.get("txt"):
            return sample.read_text(text, self.rules.text)
        if isinstance(caption := row.get("caption"), str):
            return caption
        found = _first(sample.read_record(self.rules.max_record_bytes) or {}, _CAPTION_FIELDS)
        if found is None:
            raise RejectError("caption_missing", "neither the tar nor its table has a caption")
        return found


def _row_key(key: str | None, rows: dict[str, dict[str, Any]]) -> str:
    """Return the key of a sample as the table spells it: without its folder, if the tar was packed again with one."""
    return "" if key is None else key if key in rows else key.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class RecordPairSource:
    """JSON lines with a caption and the name of an image file, or the URL of an image in tars."""

    inputs: tuple[Location, ...]
    rules: PairRules = PairRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the pairs of one file."""

        def make(record: dict[str, Any], key: str) -> Document:
            caption = _first(record, _CAPTION_FIELDS)
            if caption is None:
                caption = field(record, _CAPTION_FIELDS[0], str)
            url = record.get("url")
            image = images.find(_first(record, _IMAGE_FIELDS), url if isinstance(url, str) else None)
            return make_pair(image, caption, key, self.rules)

        def find_key(record: dict[str, Any]) -> str | None:
            return key_of(record.get("id", record.get("url", _first(record, _IMAGE_FIELDS))))

        return read_each(read_records(path, max_bytes=self.rules.max_record_bytes), find_key, make)


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((record[name] for name in names if isinstance(record.get(name), str)), None)


def find_source(
    paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer
) -> TarPairSource | RecordPairSource:
    """Return a reader of tars, with or without the tables that img2dataset writes beside them, or of JSON lines.

    Other parquet tables, the lists of pairs that COYO and LAION publish, are not read.

    Raises:
        ConfigError: there are neither tars nor JSON lines, or a file is of another kind.
    """
    listed = list_inputs(paths, (_TAR_SUFFIX, TABLE_SUFFIX))
    files = tuple(file for path in paths for file in listed[path])
    check_suffixes(files, (_TAR_SUFFIX, TABLE_SUFFIX, *SUFFIXES))
    tars = tuple(file for file in files if file.suffix.lower() == _TAR_SUFFIX)
    if not tars:
        return RecordPairSource(find_record_files(paths), options.rules)
    lists = [file for file in files if is_table(file) and not is_shard_table(file)]
    check_each_used(listed, set(files) - set(lists), "tars, as the other inputs have")
    rest = (file for file in files if not file.name.lower().endswith(_STATISTICS_ENDING))
    check_suffixes(rest, (_TAR_SUFFIX, TABLE_SUFFIX))
    if lists:
        what = f"{len(lists)} parquet files do not belong to a tar and are not read, {lists[0]} first"
        logger.warning("%s; use `select pairs` for such lists of pairs, before the images are downloaded", what)
    return TarPairSource(tars, options.rules)
