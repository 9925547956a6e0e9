import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.inputs import find_instruction_files
from megatron_vlm.data.files.table_records import read_any_records, read_table_records
from megatron_vlm.data.rejects import RejectError


def read(path, **options):
    return [
        (line, value.reason if isinstance(value, RejectError) else value)
        for line, value in read_any_records(path, **options)
    ]


def test_rows_are_records_without_their_empty_cells(tmp_path, make_table):
    columns = {"q": ["a", "b", None], "images": [["x", "y"], None, []]}
    path = make_table(tmp_path / "a.parquet", columns)
    assert read(path) == [(1, {"q": "a", "images": ["x", "y"]}), (2, {"q": "b"}), (3, {"images": []})]


def test_json_is_read_as_before(tmp_path, make_lines):
    assert read(make_lines(tmp_path / "a.jsonl", [{"q": "a"}])) == [(1, {"q": "a"})]


def test_row_numbers_go_on_over_row_groups(tmp_path, make_table):
    path = make_table(tmp_path / "a.parquet", {"n": list(range(100))}, row_group_size=33)
    assert read(path) == [(number + 1, {"n": number}) for number in range(100)]


def test_too_long_row_is_rejected_and_its_neighbours_are_intact(tmp_path, make_table):
    path = make_table(tmp_path / "a.parquet", {"q": ["a", "x" * 50, "b"], "i": [[b"1"], [b"2" * 51], [b"3"]]})
    found = read(path, max_bytes=100)
    assert found == [(1, {"q": "a", "i": [b"1"]}), (2, "record_too_long"), (3, {"q": "b", "i": [b"3"]})]


@pytest.mark.parametrize("size", [0, 10, 300])
def test_damaged_file_is_a_reject(tmp_path, make_table, size):
    path = make_table(tmp_path / "a.parquet", {"q": ["a" * 1000]}, compression="none")
    path.write_bytes(path.read_bytes()[:size])
    assert read(path) == [(1, "file_truncated")]


def test_damage_inside_loses_its_row_group_alone(tmp_path, make_table):
    texts = [f"{n}" * 100 for n in range(96)]
    path = make_table(tmp_path / "a.parquet", {"q": texts}, row_group_size=32, use_dictionary=False)
    at = pyarrow.parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    rest = [(n + 1, {"q": texts[n]}) for n in range(96)]
    assert read(path) == [*rest[:32], (33, "file_truncated"), *rest[64:]]


def test_rows_of_pictures_are_not_held_all_at_once(tmp_path, make_table):
    columns = {"i": [bytes([n]) * 500_000 for n in range(100)]}
    # A page is what pyarrow reads at least; it has a whole write batch.
    path = make_table(tmp_path / "a.parquet", columns, use_dictionary=False, write_batch_size=1, data_page_size=1 << 20)
    pool = pyarrow.default_memory_pool()
    before = highest = pool.bytes_allocated()
    for _, value in read_table_records(path):
        assert len(value["i"]) == 500_000
        highest = max(highest, pool.bytes_allocated())
    assert highest - before < 20_000_000


def test_folder_without_json_gives_its_parquet_files(tmp_path, make_table, make_lines):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_table(tmp_path / name / "2.parquet", {"q": ["a"]})
        make_table(tmp_path / name / "1.PARQUET", {"q": ["a"]})
    record = make_lines(tmp_path / "b" / "3.jsonl", [{}])
    found = find_instruction_files((tmp_path / "a", tmp_path / "b", tmp_path / "b" / "2.parquet"))
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a/1.PARQUET",
        "a/2.parquet",
        "b/3.jsonl",
        "b/2.parquet",
    ]
    assert record in found


def test_input_without_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="input has no JSON, JSON-lines or parquet files"):
        find_instruction_files((tmp_path,))
    with pytest.raises(ConfigError, match="input does not exist"):
        find_instruction_files((tmp_path / "none",))
