import json
import pickle

from megatron_vlm.data.rejects import RejectError, describe_rejects, reject_row


def test_reasons_are_listed_by_frequency_and_those_that_never_occurred_are_not():
    assert describe_rejects({"a": 1, "none": 0, "b": 3}) == "b 3, a 1"


def test_a_row_names_file_line_key_reason_and_a_bounded_detail():
    row = json.loads(reject_row("a.jsonl", 3, None, RejectError("empty_text", "x" * 1000)))
    assert row == {"file": "a.jsonl", "line": 3, "key": None, "reason": "empty_text", "detail": "x" * 300}


def test_an_error_comes_back_from_another_process_with_its_reason():
    error = pickle.loads(pickle.dumps(RejectError("empty_text", "the caption is empty")))
    assert (error.reason, error.detail) == ("empty_text", "the caption is empty")
