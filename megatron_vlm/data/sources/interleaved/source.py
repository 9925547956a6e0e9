"""Interleaved corpora: reads MMC4's JSON lines, and finds the reader of tars and parquet files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.config.sources.interleaved import InterleavedRules, Options
from megatron_vlm.data.documents import Document
from megatron_vlm.data.files.img2dataset import is_shard_table
from megatron_vlm.data.files.inputs import TABLE_SUFFIX, check_each_used, find_record_files, is_table, list_inputs
from megatron_vlm.data.files.locations import Location, check_suffixes
from megatron_vlm.data.files.records import SUFFIXES, read_records
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.interleaved.documents import find_listed_image, matched_document
from megatron_vlm.data.sources.interleaved.tables import InterleavedTableSource, check_first_table
from megatron_vlm.data.sources.interleaved.tars import InterleavedTarSource
from megatron_vlm.data.sources.source import Found, key_of, read_each
from megatron_vlm.data.text.tokenizer import Tokenizer

_TAR_SUFFIX = ".tar"


@dataclass(frozen=True, slots=True)
class InterleavedSource:
    """JSON lines as MMC4 publishes them.

    A record has `text_list` and `image_info`, each entry of it with `matched_text_index` and `image_name`, `raw_url`
    or `image_base64`.

    Source: allenai/mmc4, README.
    """

    inputs: tuple[Location, ...]
    rules: InterleavedRules = InterleavedRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the documents of one file; their sentences are not joined yet."""

        def make(record: dict[str, Any], key: str) -> Document:
            return matched_document(record, key, self.rules, images, lambda info: find_listed_image(info, images))

        records = read_records(path, max_bytes=self.rules.max_record_bytes)
        return read_each(records, lambda record: key_of(record.get("url")), make)


def find_source(
    paths: tuple[Location, ...], options: Options, tokenizer: Tokenizer
) -> InterleavedSource | InterleavedTableSource | InterleavedTarSource:
    """Return a reader of JSON, else of parquet tables with texts and images, else of tars.

    Parquet files that img2dataset writes beside its tars are not tables of documents.

    Raises:
        ConfigError: no file is found, kinds are mixed, or the rules are about matched images, which tables do not have.
        DataError: the first table has other columns.
    """
    rules, listed = options.rules, list_inputs(paths, (*SUFFIXES, TABLE_SUFFIX, _TAR_SUFFIX))
    files = tuple(file for path in paths for file in listed[path])
    check_suffixes(files, (*SUFFIXES, TABLE_SUFFIX, _TAR_SUFFIX))
    tables = tuple(filter(is_table, files))
    tars = tuple(file for file in files if file.name.lower().endswith(_TAR_SUFFIX))
    if len(tables) + len(tars) < len(files) or not files:
        if mixed := set(paths) & {*tables, *tars}:
            fix = "prepare each kind on its own; tars of images go to --images"
            where = ", ".join(sorted(map(str, mixed)))[:200]
            raise ConfigError("JSON files are mixed with another kind of input", where=where, fix=fix)
        return InterleavedSource(find_record_files(paths), rules)
    tables = tuple(file for file in tables if not is_shard_table(file))
    if not tables:
        check_each_used(listed, files, "tars, as the other inputs have")
        return InterleavedTarSource(tars, rules)
    check_each_used(listed, set(files) - set(tars), "parquet files, as the other inputs have")
    if rules.want_matches:
        fix = "leave out --min-similarity, --assignment and --image-place"
        raise ConfigError("parquet tables do not match images and sentences", where=str(tables[0]), fix=fix)
    check_first_table(tables[0])
    return InterleavedTableSource(tables, rules)
