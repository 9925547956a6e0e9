import json
import shutil

import numpy as np
import pytest

from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.config.sources.pairs import PairRules
from megatron_vlm.data.files.img2dataset import PairTable, TableFile, index_table, is_shard_table
from megatron_vlm.data.files.join_index import save_join_index
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.pairs.source import TarPairSource, find_pair_source
from megatron_vlm.data.sources.source import ReadContext


@pytest.fixture
def table(tmp_path, make_table):
    urls = [None, "http://x/1", "", "http://x/1", None, "http://x/2"]
    return make_table(tmp_path / "t.parquet", {"url": urls, "text": [f"caption {n}" for n in range(6)]})


def test_rows_without_a_url_are_found_under_none(table, tmp_path):
    rows = index_table(table, 10)
    assert rows.values.tolist() == [11, 13, 15]
    save_join_index([index_table(table, 0)], tmp_path / "index")
    found = PairTable((TableFile.open(table),), tmp_path / "index")
    assert [found.find(url) for url in ("", "http://x/1", "http://x/2")] == [[], [1, 3], [5]]


def test_tables_of_nothing_but_empty_urls_are_indexed(tmp_path, make_table):
    table = make_table(tmp_path / "t.parquet", {"url": [None, ""], "text": ["a", "b"]})
    save_join_index([index_table(table, 0)], tmp_path / "index")
    assert PairTable((TableFile.open(table),), tmp_path / "index").find("") == []


@pytest.mark.parametrize("url", ["", None, 5])
def test_an_image_without_a_url_is_not_what_a_row_without_one_means(table, tmp_path, make_tar, make_image, url):
    tar = make_tar(tmp_path / "0.tar", [("0.jpg", make_image()), ("0.json", json.dumps({"url": url}).encode())])
    save_join_index([index_table(table, 0)], tmp_path / "index")
    source = TarPairSource((tar,), PairRules(), (TableFile.open(table),), tmp_path / "index")
    context = ReadContext(ImageReader(None, ImageRules()))
    (found,) = source.read(tar, context)
    assert (found.document.reason, context.used_rows) == ("url_missing", [])
    missing = [row.line for _, row in source.missing(np.zeros(6, dtype=bool))]
    assert missing == [1, 2, 3, 4, 5, 6]


def test_suffixes_in_capitals_are_read_as_others(coyo, make_table):
    table = make_table(coyo / "00000.parquet", {"key": ["000000000"], "caption": ["own"], "url": ["u"]})
    assert is_shard_table(table)
    capitals = coyo.with_name("capitals")
    capitals.mkdir()
    for path in coyo.iterdir():
        shutil.copy(path, capitals / f"{path.stem}{path.suffix.upper()}")
    assert is_shard_table(capitals / "00000.PARQUET")
    sources = [find_pair_source((folder,), PairRules()) for folder in (coyo, capitals)]
    shown = []
    for source in sources:
        assert [path.stem for path in source.inputs] == ["00000", "00001"]
        assert [file.path.stem for file in source.tables] == ["part-00000"]
        context = ReadContext(ImageReader(None, ImageRules()))
        bare = TarPairSource(source.inputs, source.rules)
        shown.append([found.document for path in bare.inputs for found in bare.read(path, context)])
    assert shown[0] == shown[1]
    assert len(shown[0]) == 8
