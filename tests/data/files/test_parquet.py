import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.files.locations import RemoteFile
from megatron_vlm.data.files.parquet import open_parquet, read_rows
from megatron_vlm.data.rejects import RejectError


def read(path, columns=None) -> list:
    with open_parquet(path, streamed=True) as table:
        return [
            (number, cells.reason if isinstance(cells, RejectError) else cells)
            for number, cells in read_rows(table, columns)
        ]


def test_rows_of_all_row_groups_are_read_by_column_from_a_path_or_a_url(tmp_path, make_table):
    path = make_table(tmp_path / "a.parquet", {"n": list(range(50)), "rest": ["x"] * 50}, row_group_size=7)
    expected = [(n + 1, {"n": n}) for n in range(50)]
    assert read(path, ["n"]) == read(RemoteFile(f"file://{path}"), ["n"]) == expected
    assert read(path)[0] == (1, {"n": 0, "rest": "x"})


def test_row_with_text_that_is_not_utf8_is_a_reject_and_its_neighbours_are_intact(tmp_path):
    raw = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"t": raw}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, {"t": "a"}), (2, "invalid_utf8"), (3, {"t": "c"})]


def test_rows_that_a_row_group_lacks_are_a_reject(tmp_path, make_table, monkeypatch):
    path = make_table(tmp_path / "a.parquet", {"n": list(range(6))}, row_group_size=3)
    original = pyarrow.parquet.ParquetFile.iter_batches
    short = lambda *given, **options: (batch.slice(0, 2) for batch in original(*given, **options))  # noqa: E731
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", short)
    assert [found for _, found in read(path)] == [
        {"n": 0},
        {"n": 1},
        "file_truncated",
        {"n": 3},
        {"n": 4},
        "file_truncated",
    ]


def test_names_of_columns_that_are_not_utf8_are_damage(tmp_path, make_table):
    path = make_table(tmp_path / "a.parquet", {"texts": ["a"]})
    path.write_bytes(path.read_bytes().replace(b"texts", b"t\xecxts"))
    with pytest.raises(DataError, match="parquet file cannot be read"):
        open_parquet(path)


def test_random_damage_is_rejected_or_read_but_never_another_error(tmp_path, make_table):
    path = make_table(tmp_path / "a.parquet", {"texts": [["t", None]] * 12, "n": list(range(12))}, row_group_size=4)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(content)
        for position in generator.integers(0, len(content), 3):
            damaged[position] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            outcomes |= {isinstance(found, dict) or found for _, found in read(path)}
        except DataError as error:
            outcomes.add(error.what[:27])
    assert outcomes <= {True, "file_truncated", "invalid_utf8", "parquet file cannot be read"}
    assert len(outcomes) > 1


def test_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"<html>")
    with pytest.raises(DataError, match="parquet file cannot be read: .*a.parquet"):
        open_parquet(tmp_path / "a.parquet")
