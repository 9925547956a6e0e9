import os
from pathlib import Path

import pytest
import torch

from megatron_vlm.platform.huge_pages import use_huge_pages


@pytest.mark.parametrize(("given", "result"), [(None, "1"), ("0", "0")])
def test_huge_pages_are_used_unless_the_environment_says_otherwise(monkeypatch, given, result):
    # Set first, so that it is as before after the test.
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == result


def test_torch_reads_this_variable():
    assert b"THP_MEM_ALLOC_ENABLE" in (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
