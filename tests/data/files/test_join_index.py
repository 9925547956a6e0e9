import numpy as np
import pytest

from megatron_vlm.data.files.join_index import JoinIndex, join_rows, save_join_index


def rows(texts: list[str], values: list[int]) -> np.ndarray:
    return join_rows(texts, np.array(values, dtype=np.int64))


def test_rows_are_found_by_text_in_the_order_of_the_files(tmp_path):
    files = [rows(["b", "a"], [0, 1]), rows([], []), rows(["a", "c", "a"], [2, 3, 4])]
    save_join_index(files, tmp_path / "index")
    index = JoinIndex(tmp_path / "index")
    assert {text: index.find(text).tolist() for text in "abcd"} == {"a": [1, 2, 4], "b": [0], "c": [3], "d": []}


def test_an_index_of_nothing_finds_nothing(tmp_path):
    save_join_index([rows([], [])], tmp_path / "index")
    assert JoinIndex(tmp_path / "index").find("a").tolist() == []


@pytest.mark.parametrize("text", ["", "\ud800", "狗" * 1000])
def test_any_text_has_a_hash(tmp_path, text):
    save_join_index([rows([text, "other"], [7, 8])], tmp_path / "index")
    assert JoinIndex(tmp_path / "index").find(text).tolist() == [7]
