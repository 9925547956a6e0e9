import dataclasses
import json
from typing import Any

import pytest

from megatron_vlm.config import StorageError
from megatron_vlm.data.prepare.chunk import CHUNK_FILE, ChunkFacts, prepare_chunk

NO_JOB: Any = None


def report(documents: int, rejects: int) -> None:
    raise AssertionError("nothing is prepared")


def test_a_finished_chunk_is_read_and_not_prepared_again(tmp_path):
    facts = ChunkFacts(input="a.jsonl", documents=3, rejects={"empty": 1}, notes={}, shards=())
    (tmp_path / CHUNK_FILE).write_text(json.dumps(dataclasses.asdict(facts)))
    assert prepare_chunk(NO_JOB, tmp_path / "a.jsonl", "a.jsonl", tmp_path, report) == facts


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    message = r"preparation of a.jsonl stopped: No such file or directory .*chunk.*; finished input files are kept"
    with pytest.raises(StorageError, match=message):
        prepare_chunk(NO_JOB, tmp_path / "a.jsonl", "a.jsonl", tmp_path / "none" / "chunk", report)
