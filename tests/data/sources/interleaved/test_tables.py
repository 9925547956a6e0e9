import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config import ConfigError, DataError
from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.config.sources.interleaved import Options as InterleavedOptions
from megatron_vlm.data.files.join_index import save_join_index
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader, TarImages, index_tar
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.interleaved.source import find_source as find_interleaved_source
from megatron_vlm.data.sources.interleaved.tables import InterleavedTableSource
from megatron_vlm.data.sources.interleaved.tars import InterleavedTarSource
from tests.support.documents import show


@pytest.fixture(scope="module")
def pictures(make_image):
    return {name: make_image(seed=seed) for seed, name in enumerate("ABC")}


@pytest.fixture
def reader(tmp_path, make_tar, pictures):
    """Images http://x/A.jpg, B and C in a tar of img2dataset."""
    members = []
    for number, (name, data) in enumerate(pictures.items()):
        record = json.dumps({"url": f"http://x/{name}.jpg"}).encode()
        members += [(f"{number}.jpg", data), (f"{number}.json", record)]
    path = make_tar(tmp_path / "images.tar", members)
    save_join_index([index_tar(path, 0)], tmp_path / "index")
    return ImageReader(TarImages((path,), tmp_path / "index", max_bytes=1 << 20), ImageRules())


@pytest.fixture
def read(tmp_path, make_table, pictures, reader):
    """Read a table of these columns."""

    def read(columns, *, reader=reader, options=None, **rules):
        path = make_table(tmp_path / "0.parquet", columns, **(options or {}))
        names = {data: name for name, data in pictures.items()}
        found = InterleavedTableSource((path,), InterleavedRules(**rules)).read(path, reader)
        return [(one.line, one.key, show(one, names)) for one in found]

    return read


def url(name: str) -> str:
    return f"http://x/{name}.jpg"


def test_images_are_joined_by_url_and_stand_at_their_places(read):
    columns = {
        "images": [[url("A"), None, url("B")], [None, url("C")]],
        "texts": [[None, "one", None], ["two", None]],
        "general_metadata": [json.dumps({"url": "http://page/1"}), "not json"],
        "metadata": ["[...]", None],
    }
    assert read(columns) == [(1, "http://page/1", ["A", "one", "B"]), (2, None, ["two", "C"])]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_images_may_be_inside_of_the_table(read, pictures, form):
    wrapped = {name: data if form == "bytes" else {"bytes": data, "path": None} for name, data in pictures.items()}
    columns = {"images": [[wrapped["A"], None], [None, wrapped["B"]]], "texts": [[None, "a"], ["b", None]]}
    columns["id"] = [7, 8]
    reader = ImageReader(None, ImageRules())
    assert read(columns, reader=reader) == [(1, "7", ["A", "a"]), (2, "8", ["b", "B"])]


def test_images_may_be_files_of_a_folder(read, tmp_path, pictures):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jpg").write_bytes(pictures["A"])
    reader = ImageReader(FolderImages(tmp_path / "files", max_bytes=1 << 20), ImageRules())
    rows = [["a.jpg", None], ["../a.jpg", None], [{"bytes": None, "path": "a.jpg"}, None]]
    found = [read({"images": [row], "texts": [[None, "t"]]}, reader=reader)[0][2] for row in rows]
    assert found == [["A", "t"], "image_path", ["A", "t"]]


def test_a_url_is_never_matched_by_the_end_of_its_name(read):
    assert read({"images": [["http://elsewhere/1.jpg", None]], "texts": [[None, "t"]]}) == [(1, None, "image_missing")]


def test_the_rules_about_images_are_those_of_mmc4(read, reader):
    columns = {"images": [[url("A"), url("gone"), None, url("B"), url("C")]], "texts": [[None, None, "t", None, None]]}
    assert read(columns) == [(1, None, "image_missing")]
    assert read(columns, bad_image="image", max_images=2) == [(1, None, ["A", "t", "B"])]
    assert reader.notes["dropped_images"] == 1
    assert read(columns, bad_image="image", min_images=4) == [(1, None, "too_few_images")]


def test_rows_are_numbered_through_all_row_groups(read):
    columns = {"images": [[url("A"), None]] * 40, "texts": [[None, f"t{n}"] for n in range(40)]}
    assert read(columns, options={"row_group_size": 7}) == [(n + 1, None, ["A", f"t{n}"]) for n in range(40)]


@pytest.mark.parametrize(
    ("images", "texts", "reason"),
    [
        (None, ["t"], "json_type"),
        ([None], None, "json_type"),
        ([None, None], ["t"], "json_type"),
        ([None], [None], "json_type"),
        ([url("A")], ["t"], "json_type"),
        ([], [], "too_few_images"),
        ([url("A"), None], [None, "a\x00"], "control_character"),
        ([url("A"), None], [None, "<image>" * 1_000_000], "text_too_long"),
        ([url("A")] * 1001, [None] * 1001, "too_many_images"),
        ([url("gone"), None], [None, "t"], "image_missing"),
    ],
)
def test_a_bad_row_is_rejected_and_its_neighbours_are_intact(read, images, texts, reason):
    good = ([url("C"), None], [None, "t"])
    columns = {"images": [good[0], images, good[0]], "texts": [good[1], texts, good[1]]}
    assert [found for _, _, found in read(columns)] == [["C", "t"], reason, ["C", "t"]]


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "image_empty"), (b"<html>", "image_format"), (b"\xff\xd8\xff", "image_truncated")]
)
def test_a_bad_picture_inside_of_the_table_is_rejected(read, data, reason):
    assert read({"images": [[data, None]], "texts": [[None, "t"]]}) == [(1, None, reason)]


def test_text_that_is_not_utf8_rejects_its_row_alone(tmp_path, reader, pictures):
    raw = pyarrow.array([["a", None], ["b\xff".encode("latin-1"), None]], pyarrow.list_(pyarrow.binary()))
    texts = pyarrow.ListArray.from_arrays(raw.offsets, raw.values.cast(pyarrow.string(), safe=False))
    path = tmp_path / "0.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texts": texts, "images": [[None, url("A")]] * 2}), path)
    found = list(InterleavedTableSource((path,)).read(path, reader))
    assert [show(one, {pictures["A"]: "A"}) for one in found] == [["a", "A"], "invalid_utf8"]


def test_a_damaged_row_group_is_one_reject_and_the_others_are_read(tmp_path, make_table, reader, pictures):
    columns = {"images": [[url("A"), None]] * 30, "texts": [[None, f"t{n}" * 50] for n in range(30)]}
    path = make_table(tmp_path / "0.parquet", columns, row_group_size=10, use_dictionary=False, compression="zstd")
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1)
    start = min(group.column(i).data_page_offset for i in range(group.num_columns))
    content = bytearray(path.read_bytes())
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    found = list(InterleavedTableSource((path,)).read(path, reader))
    reasons = [one.document.reason for one in found if isinstance(one.document, RejectError)]
    assert reasons == ["file_truncated"]
    assert [one.line for one in found] == [*range(1, 12), *range(21, 31)]


def test_a_file_that_is_no_parquet_is_one_reject(tmp_path, reader):
    (tmp_path / "0.parquet").write_bytes(b"PAR1 no")
    (found,) = InterleavedTableSource(()).read(tmp_path / "0.parquet", reader)
    assert show(found, {}) == "file_truncated"


def test_a_table_of_another_kind_among_the_others_is_one_reject(read):
    assert read({"images": [[url("A")]]}) == [(None, None, "column_missing")]


def test_the_kind_of_input_is_seen_from_its_files(tmp_path, make_table, make_tar, make_lines):
    tables, tars = tmp_path / "tables", tmp_path / "tars"
    tables.mkdir()
    tars.mkdir()
    rules = InterleavedRules()
    make_table(
        tables / "0.parquet", {"texts": [["t"]], "images": pyarrow.array([[None]], pyarrow.list_(pyarrow.string()))}
    )
    make_tar(tars / "0.tar", [])
    make_table(tars / "0.parquet", {"key": ["0"], "url": ["u"]})
    assert find_interleaved_source((tables,), InterleavedOptions(rules=rules), None) == InterleavedTableSource(
        (tables / "0.parquet",)
    )
    assert find_interleaved_source((tars,), InterleavedOptions(rules=rules), None) == InterleavedTarSource(
        (tars / "0.tar",)
    )
    path = make_lines(tables / "docs.jsonl", [])
    assert find_interleaved_source((tables,), InterleavedOptions(rules=rules), None) == InterleavedSource((path,))
    with pytest.raises(ConfigError, match="JSON files are mixed with another kind of input .*0.tar"):
        find_interleaved_source((path, tars / "0.tar"), InterleavedOptions(rules=rules), None)
    with pytest.raises(ConfigError, match="input has no JSON"):
        find_interleaved_source((tmp_path,), InterleavedOptions(rules=rules), None)


def test_similarities_of_tables_are_refused_at_once(tmp_path, make_table):
    path = make_table(tmp_path / "0.parquet", {"texts": [["t"]], "images": [[None]]})
    for rules in (InterleavedRules(min_similarity=0.2), InterleavedRules(assignment="linear")):
        with pytest.raises(ConfigError, match="do not match images .*fix: leave out --min-similarity"):
            find_interleaved_source((path,), InterleavedOptions(rules=rules), None)


def test_tables_of_pairs_are_refused_at_once(tmp_path, make_table):
    path = make_table(tmp_path / "0.parquet", {"url": ["u"], "text": ["t"]})
    with pytest.raises(DataError, match="has no column texts and images .*fix: use prepare pairs"):
        find_interleaved_source((path,), InterleavedOptions(), None)
