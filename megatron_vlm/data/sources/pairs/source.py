"""COYO-like corpora: an image and its caption."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.sources.pairs import Options, PairRules
from megatron_vlm.data.documents import Document, Image, Text, clean_text
from megatron_vlm.data.files.img2dataset import (
    PairTable,
    TableFile,
    beside,
    is_shard_table,
    read_shard_table,
    unused_rows,
)
from megatron_vlm.data.files.inputs import check_each_used, find_record_files, list_inputs
from megatron_vlm.data.files.locations import Location, check_suffixes, name_files
from megatron_vlm.data.files.records import SUFFIXES, field, parse_record, read_records
from megatron_vlm.data.files.tars import Member, TarReader, find_image, group_members, list_members
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.source import Found, ReadContext, key_of
from megatron_vlm.data.text.tokenizer import Tokenizer

_IMAGE_FIELDS = ("image", "image_name", "file_name", "image_path", "path")
_CAPTION_FIELDS = ("caption", "text", "txt")
_TAR_SUFFIX, _TABLE_SUFFIX = ".tar", ".parquet"
_STATISTICS_ENDING = "_stats.json"
"""Of the files that img2dataset writes beside its tars."""
_Group = dict[str, Member | None]


def make_pair(image: Image, caption: str, key: str, rules: PairRules) -> Document:
    """Return the document: the image, then its caption.

    Raises:
        RejectError: the caption is empty or not taken.
    """
    caption = clean_text(caption, rules.text)
    if not caption or caption.isspace():
        raise RejectError("empty_text", "the caption is empty")
    return Document((image, Text(caption)), key=key)


@dataclass(frozen=True, slots=True)
class TarPairSource:
    """Tars as img2dataset writes them: per key an image, and a caption in .txt, in .json or in a parquet table.

    A table with the name of the tar is img2dataset's own: its rows without an image are rejects with the reason that
    it gives. Any other parquet table says which pairs are wanted, joined by URL; captions that the tar lacks come from
    it as well. Files are paired by their names, in whatever order the tar has them.
    """

    inputs: tuple[Location, ...]
    rules: PairRules = PairRules()
    tables: tuple[TableFile, ...] = ()
    """Parquet files that are joined by URL."""
    table_index: Path | None = None
    """Where `prepare` put the index of the tables."""

    def read(self, path: Location, context: ReadContext) -> Iterator[Found]:
        """Yield the pairs of one tar."""
        table = PairTable(self.tables, self.table_index) if self.table_index else None
        own = read_shard_table(beside(path, _TABLE_SUFFIX))
        with TarReader(path) as tar:
            members, damage = list_members(tar)
            groups = group_members(iter(members))
            for key, group in groups.items():
                try:
                    pair = _TarPair(tar, key, group, own.get(key, {}), self.rules)
                    yield Found(None, key, self._document(pair, table, context))
                except RejectError as error:
                    yield Found(None, key, error)
        for key, row in own.items():
            if key not in groups:
                status = row.get("error_message") or row.get("status")
                yield Found(None, key, RejectError("image_missing", f"the tar has no image; img2dataset says {status}"))
        if damage is not None:
            yield Found(None, None, damage)

    def missing(self, used_rows: np.ndarray) -> Iterator[tuple[Location, Found]]:
        """Yield the rows of the joined tables that no tar has an image for.

        Args:
            used_rows: bool[rows of all tables].
        """
        for path, row, url in unused_rows(self.tables, used_rows):
            error = RejectError("image_missing", "no tar has an image of this URL")
            yield path, Found(row, key_of(url), error)

    def _document(self, pair: "_TarPair", table: PairTable | None, context: ReadContext) -> Document:
        caption = pair.caption()
        if table is not None:
            url = pair.url()
            rows = table.find(url)
            context.used_rows += rows
            if not rows:
                raise RejectError("not_selected", f"no parquet table has the URL {url[:200]!r}")
            caption = table.caption(rows[0], url) if caption is None else caption
        if caption is None:
            raise RejectError("caption_missing", "neither the tar nor a table has a caption")
        return make_pair(pair.image(context.images), caption, pair.key, self.rules)


class _TarPair:
    """The members of one key."""

    def __init__(self, tar: TarReader, key: str, group: _Group, row: dict[str, Any], rules: PairRules) -> None:
        self._tar, self.key, self._group, self._row, self._rules = tar, key, group, row, rules
        self._record: dict[str, Any] | None = None
        if None in group.values():
            name = next(extension for extension, member in group.items() if member is None)
            raise RejectError("duplicate_name", f"the tar has {key[:200]}.{name} twice")

    def image(self, images: ImageReader) -> Image:
        member = find_image(self._group)
        if member is None:
            raise RejectError("image_missing", f"the key has {', '.join(self._group) or 'nothing'}"[:200])
        return images.check(self._tar.read(member, images.max_bytes, "image_bytes"))

    def caption(self) -> str | None:
        if text := self._group.get("txt"):
            try:
                return self._tar.read(text, 4 * self._rules.text.max_characters, "text_too_long").decode()
            except UnicodeDecodeError as error:
                raise RejectError("invalid_utf8", f"byte {error.start} of the caption") from None
        if isinstance(caption := self._row.get("caption"), str):
            return caption
        for name in _CAPTION_FIELDS:
            if isinstance(caption := self._json().get(name), str):
                return caption
        return None

    def url(self) -> str:
        url = self._row.get("url") or self._json().get("url")
        if not isinstance(url, str) or not url:
            raise RejectError("url_missing", "the parquet table is joined by URL, and the tar has none for this image")
        return url

    def _json(self) -> dict[str, Any]:
        if self._record is None:
            member = self._group.get("json")
            self._record = {}
            if member:
                self._record = parse_record(self._tar.read(member, self._rules.max_record_bytes, "record_too_long"))
        return self._record


@dataclass(frozen=True, slots=True)
class RecordPairSource:
    """JSON lines that name an image file, or a URL in tars, and have a caption."""

    inputs: tuple[Location, ...]
    rules: PairRules = PairRules()

    def read(self, path: Location, context: ReadContext) -> Iterator[Found]:
        """Yield the pairs of one file."""
        for line, value in read_records(path, max_bytes=self.rules.max_record_bytes):
            if isinstance(value, RejectError):
                yield Found(line, None, value)
                continue
            name = _first(value, _IMAGE_FIELDS)
            key = key_of(value.get("id", value.get("url", name)))
            try:
                caption = field(value, _CAPTION_FIELDS[0], str) if (c := _first(value, _CAPTION_FIELDS)) is None else c
                url = value.get("url")
                image = context.images.find(name, url if isinstance(url, str) else None)
                yield Found(line, key, make_pair(image, caption, key or "", self.rules))
            except RejectError as error:
                yield Found(line, key, error)


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((record[name] for name in names if isinstance(record.get(name), str)), None)


def find_source(
    paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer
) -> TarPairSource | RecordPairSource:
    """Return the reader that fits the files; see `find_pair_source`."""
    return find_pair_source(paths, options.rules)


def find_pair_source(paths: tuple[Location, ...], rules: PairRules) -> TarPairSource | RecordPairSource:
    """Look at what the input has: tars, with or without parquet tables, or JSON lines.

    Raises:
        ConfigError: neither is there, or a file is of another kind.
    """
    listed = list_inputs(paths, (_TAR_SUFFIX, _TABLE_SUFFIX))
    files = tuple(file for path in paths for file in listed[path])
    check_suffixes(files, (_TAR_SUFFIX, _TABLE_SUFFIX, *SUFFIXES))
    tars = tuple(file for file in files if file.suffix.lower() == _TAR_SUFFIX)
    if not tars:
        return RecordPairSource(find_record_files(paths), rules)
    check_each_used(listed, files, "tars or parquet files, as the other inputs have")
    files = tuple(file for file in files if not file.name.lower().endswith(_STATISTICS_ENDING))
    check_suffixes(files, (_TAR_SUFFIX, _TABLE_SUFFIX))
    tables = [file for file in files if file.suffix.lower() == _TABLE_SUFFIX and not is_shard_table(file)]
    return TarPairSource(tars, rules, tuple(map(TableFile.open, name_files(tables).values())))
