import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.inputs import (
    check_each_used,
    find_files,
    find_instruction_files,
    find_record_files,
    is_table,
    list_inputs,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.JSON", "c.parquet", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_files_of_a_folder_are_found_by_suffix_and_in_order(folder):
    assert [path.name for path in find_record_files((folder,))] == ["a.JSON", "b.jsonl"]
    assert [path.name for path in find_files((folder,), (".txt",), "texts")] == ["d.txt"]


def test_tables_are_read_where_a_folder_has_no_json(folder):
    assert [path.name for path in find_instruction_files((folder,))] == ["a.JSON", "b.jsonl"]
    for name in ("a.JSON", "b.jsonl"):
        (folder / name).unlink()
    assert [path.name for path in find_instruction_files((folder,))] == ["c.parquet"]


def test_a_table_is_told_by_its_name(folder):
    assert is_table(folder / "x.PARQUET")
    assert not is_table(folder / "parquet.json")


def test_a_folder_without_files_of_the_kind_is_named(folder):
    with pytest.raises(ConfigError, match="input has no tars .*fix: check --input"):
        find_files((folder,), (".tar",), "tars")
    with pytest.raises(ConfigError, match="input does not exist"):
        list_inputs([folder / "none"], (".tar",))


def test_an_input_of_which_nothing_is_used_is_refused_beside_others(folder):
    listed = {folder / "one": [folder / "a.JSON"], folder / "two": [folder / "d.txt"]}
    check_each_used(listed, [folder / "a.JSON", folder / "d.txt"], "JSON files")
    with pytest.raises(ConfigError, match="input has no JSON files .*two.*leave it out"):
        check_each_used(listed, [folder / "a.JSON"], "JSON files")
