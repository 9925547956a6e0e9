from pathlib import Path

import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.data.prepare.array_task import ArrayTask


@pytest.mark.parametrize(("items", "count"), [(3, 3), (10, 3), (7, 1), (100, 99)])
def test_shares_in_order_are_all_items_in_order_and_none_is_empty(items, count):
    shares = [ArrayTask(index, count).choose(range(items)) for index in range(1, count + 1)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert min(map(len, shares)) > 0


def test_more_shares_than_files_are_refused():
    with pytest.raises(UsageError, match="--part 1/4: there are 3 input files for 4 parts; fix: use at most 3 parts"):
        ArrayTask(1, 4).choose("abc")


def test_a_share_is_read_from_text_and_written_beside_the_output():
    share = ArrayTask.parse("2/12")
    assert (share.index, share.count, str(share)) == (2, 12, "2/12")
    assert share.folder(Path("shards/mmc4")) == Path("shards/mmc4.part-2-of-12")


@pytest.mark.parametrize("text", ["", "2", "/", "1/", "/3", "a/b", "-1/3", "1/3/5", "1.0/3", "1/0"])
def test_other_text_is_refused(text):
    with pytest.raises(UsageError, match="is not of the form I/N"):
        ArrayTask.parse(text)


@pytest.mark.parametrize("text", ["0/3", "4/3"])
def test_shares_are_numbered_from_1(text):
    with pytest.raises(UsageError, match=f"--part {text} is not one of 1/3 to 3/3"):
        ArrayTask.parse(text)
