"""metrics.jsonl is read as far as it is whole."""

import json

import pytest

from megatron_vlm.platform.files import metrics
from megatron_vlm.platform.files.metrics import PastRecords, read_last, read_metrics, read_records


def test_a_repeated_iteration_counts_once_and_half_a_line_not_at_all(tmp_path):
    lines = [
        '{"iteration": 1, "loss": 3.0}',
        '{"iteration": 2, "loss": 2.0}',
        "[5]",
        '{"iteration": 2, "loss": 2.5}',
        '{"iteration": 2, "validation_loss": 2.75}',
        '{"iteration": 3, "los',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert read_metrics(tmp_path) == [
        {"iteration": 1, "loss": 3.0},
        {"iteration": 2, "loss": 2.5, "validation_loss": 2.75},
    ]
    assert read_records(tmp_path)[1] == 2


def test_a_run_without_records_has_none(tmp_path):
    assert read_last(tmp_path, 3) == []
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("count", [1, 5, 700, 2000])
def test_the_last_records_are_those_of_the_whole_file(tmp_path, count):
    lines = [json.dumps({"iteration": number // 2, "loss": number, "x": "y" * 400}) for number in range(2000)]
    lines[1990] = "[5]"
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 2']))
    assert read_last(tmp_path, count) == read_metrics(tmp_path)[-count:]


def test_the_last_records_do_not_take_the_whole_file(tmp_path, monkeypatch):
    lines = [json.dumps({"iteration": number, "x": "y" * 400}) for number in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    parsed = []
    parse = metrics.parse_record
    monkeypatch.setattr(metrics, "parse_record", lambda line: parsed.append(line) or parse(line))
    assert [record["iteration"] for record in read_last(tmp_path, 2)] == [4998, 4999]
    assert len(parsed) < 200


def test_lost_records_are_cut_off_only_when_asked_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n[5]\n{"iteration": 2}\n{"iteration": 3}\n{"iter')
    before = path.read_text()
    past = PastRecords(path, 2)
    assert ([one["iteration"] for one in past.kept], [one["iteration"] for one in past.lost]) == ([1, 2], [3])
    assert path.read_text() == before
    past.drop_lost()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_a_file_with_nothing_to_cut_off_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n')
    before = path.stat().st_ino
    PastRecords(path, 1).drop_lost()
    assert path.stat().st_ino == before
