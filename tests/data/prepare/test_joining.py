import numpy as np
import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.prepare.part import USED_ROWS_FILE, load_used_rows, save_used_rows
from megatron_vlm.data.rejects import describe_rejects


def test_rejects_are_listed_by_frequency():
    assert describe_rejects({"a": 1, "b": 3}) == "b 3, a 1"


def test_used_rows_of_all_pieces_are_kept_once(tmp_path):
    save_used_rows(tmp_path, [np.array([4, 1]), np.array([1, 0])])
    assert load_used_rows(tmp_path, 5).tolist() == [0, 1, 4]


def test_no_used_rows_are_none(tmp_path):
    save_used_rows(tmp_path, [])
    assert load_used_rows(tmp_path, 0).tolist() == []


def test_used_rows_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(DataError, match=f"list of used rows cannot be read.*{USED_ROWS_FILE}"):
        load_used_rows(tmp_path, 5)
    (tmp_path / USED_ROWS_FILE).write_bytes(b"x")
    with pytest.raises(DataError, match="list of used rows cannot be read"):
        load_used_rows(tmp_path, 5)


def test_used_rows_beyond_the_tables_are_refused(tmp_path):
    save_used_rows(tmp_path, [np.array([5])])
    with pytest.raises(DataError, match="goes beyond the 5 there are"):
        load_used_rows(tmp_path, 5)
