import json
import logging
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config import ConfigError, DataError, StorageError, UsageError
from megatron_vlm.data.select import pairs as select_module
from megatron_vlm.data.select.pairs import SelectRules, parse_count, select_pairs
from megatron_vlm.platform.files.durable import UNFINISHED
from megatron_vlm.platform.launch.exit_status import shorten

B32, L14 = "clip_similarity_vitb32", "clip_similarity_vitl14"


def write_table(path: Path, scores, *, first: int = 0, group: int = 1000, **more) -> Path:
    count = len(scores)
    columns = {"id": list(range(first, first + count)), "url": [f"http://x/{first + i}" for i in range(count)]}
    table = pyarrow.table(columns | {"text": [f"cat {i}" for i in range(count)], "score": scores} | more)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def kept_ids(folder: Path) -> list[int]:
    """Ids of the kept rows, file by file."""
    files = sorted(folder.glob("*.parquet"))
    return [key for path in files for key in pyarrow.parquet.read_table(path).column("id").to_pylist()]


def by_score(**options) -> SelectRules:
    return SelectRules(columns=("score",), **options)


def test_top_rows_equal_a_full_sort_of_200_000_rows_in_20_files_with_ties(tmp_path):
    generator = np.random.default_rng(0)
    files, scores = [], []
    for number in range(20):
        # 200 distinct values: the border falls among about a thousand equal scores
        b32, l14 = (generator.integers(0, 100, 10_000).astype(np.float32) / 100 for _ in range(2))
        l14 = np.where(b32 > 0.5, 0.25, l14).astype(np.float32)
        scores.append(b32.astype(np.float64) + l14.astype(np.float64))
        path = tmp_path / f"part-{number:05d}.parquet"
        files.append(write_table(path, b32, first=number * 10_000, group=3000, **{B32: b32, L14: l14}))
    everything = np.concatenate(scores)
    for top in (1, 12_345, 150_000):
        report = select_pairs(tuple(files), tmp_path / f"top{top}", SelectRules(columns=(B32, L14), top=top))
        # a stable sort by falling score: of equal scores the first row comes first
        expected = np.sort(np.argsort(-everything, kind="stable")[:top])
        assert kept_ids(tmp_path / f"top{top}") == expected.tolist()
        assert report["lowest_kept_score"] == everything[expected].min()
        assert report["rows"] == 200_000 == report["kept"] + sum(report["dropped"].values())


def test_arrow_memory_does_not_grow_with_the_rows_of_a_file(tmp_path):
    def peak(num_rows: int) -> int:
        path = write_table(tmp_path / f"{num_rows}.parquet", np.arange(num_rows) / 7, group=5000)
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        pool = pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
        before = pyarrow.default_memory_pool()
        pyarrow.set_memory_pool(pool)
        try:
            select_pairs((path,), output, by_score(top=100))
        finally:
            pyarrow.set_memory_pool(before)
        return pool.max_memory()

    peak(100_000)  # what is allocated once
    assert peak(400_000) < 1.3 * peak(100_000)


def test_all_columns_and_their_types_are_kept(tmp_path):
    more = {"phash": ["a", None, "c"], "sizes": pyarrow.array([[1], [2, 3], None], pyarrow.list_(pyarrow.int32()))}
    path = write_table(tmp_path / "a.parquet", [0.1, 0.3, 0.2], **more)
    select_pairs((path,), tmp_path / "out", by_score(top=2))
    original, chosen = (pyarrow.parquet.read_table(folder / "a.parquet") for folder in (tmp_path, tmp_path / "out"))
    assert chosen.equals(original.take([1, 2]))
    assert chosen.schema.equals(original.schema)


def test_the_same_selection_is_the_same_bytes(tmp_path):
    files = tuple(
        write_table(tmp_path / f"{n}.parquet", np.random.default_rng(n).random(500), first=n * 500) for n in range(3)
    )
    for name in ("one", "two"):
        select_pairs(files, tmp_path / name, by_score(top=70))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {"0.parquet", "1.parquet", "2.parquet", "_report.json", "_scores.png"}


def test_missing_and_not_finite_scores_are_dropped_and_counted(tmp_path):
    path = write_table(tmp_path / "a.parquet", [0.5, None, float("nan"), float("inf"), 0.1, 0.9])
    report = select_pairs((path,), tmp_path / "out", by_score(top=2))
    assert kept_ids(tmp_path / "out") == [0, 5]
    assert report["dropped"] == {"score_missing": 1, "score_not_finite": 2, "score_too_low": 1}


def test_fraction_keeps_the_best_of_each_file(tmp_path):
    first = write_table(tmp_path / "a.parquet", [0.9, 0.8, 0.7, 0.6, 0.5])
    second = write_table(tmp_path / "b.parquet", [0.1, 0.4, 0.2, 0.3, 0.4], first=5)
    report = select_pairs((first, second), tmp_path / "out", by_score(fraction=Fraction("0.4")))
    assert kept_ids(tmp_path / "out") == [0, 1, 6, 9]
    assert [file["kept"] for file in report["files"]] == [2, 2]


def test_fraction_of_29_percent_of_100_rows_is_29(tmp_path):
    path = write_table(tmp_path / "a.parquet", np.arange(100) / 100)
    assert select_pairs((path,), tmp_path / "out", by_score(fraction=Fraction("0.29")))["kept"] == 29


def test_min_score_is_applied_first_and_a_shortage_is_told(tmp_path, caplog):
    path = write_table(tmp_path / "a.parquet", [0.9, 0.6, 0.7, 0.1, 0.2])
    with caplog.at_level(logging.WARNING):
        report = select_pairs((path,), tmp_path / "top", by_score(top=4, min_score=0.6))
        select_pairs((path,), tmp_path / "share", by_score(fraction=Fraction("0.8"), min_score=0.6))
    assert kept_ids(tmp_path / "top") == kept_ids(tmp_path / "share") == [0, 2]
    assert report["dropped"] == {"min_score": 3}
    assert "only 2 rows have a usable score, fewer than the 4 wanted" in caplog.text
    assert "a.parquet has 2 usable rows, fewer than the 4 wanted" in caplog.text


def test_files_of_one_name_are_numbered_and_files_without_a_kept_row_left_out(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
    files = tuple(
        write_table(tmp_path / name / "a.parquet", scores, first=first)
        for name, scores, first in (("x", [0.9], 0), ("y", [0.1], 1), ("z", [0.8], 2))
    )
    report = select_pairs(files, tmp_path / "out", by_score(top=2))
    assert [file["output"] for file in report["files"]] == ["00000-a.parquet", None, "00002-a.parquet"]
    assert kept_ids(tmp_path / "out") == [0, 2]


def test_report_has_the_distribution_of_kept_and_dropped_scores(tmp_path):
    path = write_table(tmp_path / "a.parquet", np.arange(1000) / 1000)
    select_pairs((path,), tmp_path / "out", by_score(top=300))
    report = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert sum(row["kept"] for row in report["histogram"]) == 300
    assert sum(row["dropped"] for row in report["histogram"]) == 700
    assert report["lowest_kept_score"] == 0.7


def test_row_groups_without_a_kept_row_are_not_read(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", [*[0.1] * 10, *[0.9] * 5, *[0.1] * 10, *[0.8] * 5], group=5)
    asked = []
    original = select_module._batches
    monkeypatch.setattr(
        select_module, "_batches", lambda path, **choice: asked.append(choice) or original(path, **choice)
    )
    select_pairs((path,), tmp_path / "out", by_score(top=10))
    assert asked[-1] == {"row_groups": [2, 5]}
    assert kept_ids(tmp_path / "out") == [10, 11, 12, 13, 14, 25, 26, 27, 28, 29]


def test_missing_column_names_file_and_column_before_anything_is_read(tmp_path):
    good = write_table(tmp_path / "a.parquet", [0.1])
    bad = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"url": ["u"]}), bad)
    with pytest.raises(DataError, match=r"no column score \(.*b\.parquet\)"):
        select_pairs((good, bad), tmp_path / "out", by_score(top=1))
    assert not (tmp_path / "out").exists()


def test_missing_column_is_named_in_the_line_however_many_others_there_are(tmp_path):
    path = tmp_path / "coyo.parquet"
    names = {f"number_of_something_{i:02d}": [i] for i in range(40)}
    pyarrow.parquet.write_table(pyarrow.table({"url": ["u"], **names, "clip_similarity": [0.1]}), path)
    with pytest.raises(DataError) as caught:
        select_pairs((path,), tmp_path / "out", by_score(top=1))
    line = shorten(caught.value)
    assert "no column score " in line
    assert "use --by with clip_similarity, number_of_something_00" in line


def test_column_of_text_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", ["0.5"])
    with pytest.raises(DataError, match=r"column score is of type string, not a number \(.*a\.parquet"):
        select_pairs((path,), tmp_path / "out", by_score(top=1))


@pytest.mark.parametrize("damage", ["end", "middle"])
def test_damaged_file_is_named(tmp_path, damage):
    path = write_table(tmp_path / "a.parquet", np.random.default_rng(0).random(5000))
    content = path.read_bytes()
    path.write_bytes(
        content[:-100] if damage == "end" else b"PAR1" + bytes(len(content) // 2) + content[len(content) // 2 + 4 :]
    )
    with pytest.raises(DataError, match=r"parquet file cannot be read: .*a\.parquet"):
        select_pairs((path,), tmp_path / "out", by_score(top=1))


def test_no_usable_row_is_an_error_that_says_why(tmp_path):
    path = write_table(tmp_path / "a.parquet", [float("nan"), 0.2])
    with pytest.raises(DataError, match=r"none of 2 rows are left: score_not_finite 1, min_score 1 "):
        select_pairs((path,), tmp_path / "out", by_score(top=1, min_score=0.5))
    with pytest.raises(DataError, match="none of 2 rows are left"):
        select_pairs((path,), tmp_path / "out", by_score(fraction=Fraction("0.1")))


def test_file_given_twice_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", [0.1])
    with pytest.raises(ConfigError, match=r"given twice \(.*a\.parquet"):
        select_pairs((path, path), tmp_path / "out", by_score(top=1))


def test_output_that_is_not_empty_is_refused_and_left_overs_are_replaced(tmp_path):
    path = write_table(tmp_path / "a.parquet", [0.1])
    (tmp_path / f"out{UNFINISHED}").mkdir()
    (tmp_path / f"out{UNFINISHED}" / "half.parquet").write_text("x")
    select_pairs((path,), tmp_path / "out", by_score(top=1))
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"a.parquet", "_report.json", "_scores.png"}
    with pytest.raises(ConfigError, match="output folder is not empty"):
        select_pairs((path,), tmp_path / "out", by_score(top=1))


def test_full_disk_is_a_storage_error_and_no_output(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    path = write_table(tmp_path / "a.parquet", [0.1])
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match="No space left on device"):
        select_pairs((path,), tmp_path / "out", by_score(top=1))
    assert not (tmp_path / "out").exists()


def test_file_that_changes_between_the_passes_is_refused(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", [0.1, 0.2])
    monkeypatch.setattr(select_module, "_batches", lambda *_, **__: iter(()))
    with pytest.raises(DataError, match="0 rows were read, 2 are expected"):
        select_pairs((path,), tmp_path / "out", by_score(top=1))


@pytest.mark.parametrize(
    ("text", "value"), [("25M", 25_000_000), ("2.5m", 2_500_000), ("400K", 400_000), ("7", 7), ("1B", 10**9)]
)
def test_counts_may_have_a_unit(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "many", "0", "-1", "1.5", "1.0001K"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_count(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": (), "top": 1}, "names no column"),
        ({"columns": ("a", ""), "top": 1}, "names no column, or an empty one"),
        ({"columns": ("a",)}, "either --top or --fraction"),
        ({"columns": ("a",), "top": 1, "fraction": Fraction(1)}, "either --top or --fraction"),
        ({"columns": ("a",), "fraction": Fraction(3, 2)}, r"--fraction 1\.5 is not above 0 and up to 1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SelectRules(**options)
