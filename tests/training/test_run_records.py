import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import DataError
from megatron_vlm.platform.files.events import BEGIN, END, START, record_event
from megatron_vlm.platform.launch.exit_status import ExitStatus, write_exit_status
from megatron_vlm.training.run_records import read_run


def write_metrics(run_dir: Path, iterations, **values) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        for iteration in iterations:
            stream.write(json.dumps({"iteration": iteration, "loss": 1.0 / iteration, **values}) + "\n")


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither metrics.jsonl nor config.yaml .*; fix: name the run_dir"):
        read_run(tmp_path)


def test_run_without_an_iteration_has_its_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("stage: align\n")
    run = read_run(tmp_path)
    assert (run.metrics, run.events, run.end, run.config) == ([], [], None, {"stage": "align"})


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n", "a: 2024-99-99"])
def test_settings_that_cannot_be_read_are_none(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert read_run(tmp_path).config == {}


def test_line_that_a_kill_cut_short_is_left_out_and_counted(tmp_path):
    write_metrics(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"iteration": 4, "lo\xff')
    run = read_run(tmp_path)
    assert [record["iteration"] for record in run.metrics] == [1, 2, 3]
    assert run.unreadable_lines == 1


def test_padding_leaves_out_what_is_no_number(tmp_path):
    write_metrics(tmp_path, [1], tokens=75, padding=0.25)
    write_metrics(tmp_path, [2], tokens="x", padding=0.5)
    write_metrics(tmp_path, [3], tokens=75, padding=None)
    assert read_run(tmp_path).padding == 0.25


def test_later_record_of_an_iteration_counts(tmp_path):
    write_metrics(tmp_path, range(1, 6), tokens=1)
    write_metrics(tmp_path, range(4, 8), tokens=2)
    run = read_run(tmp_path)
    assert run.series("tokens") == ([1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 2, 2, 2, 2])


def test_validation_on_a_line_of_its_own_belongs_to_its_iteration(tmp_path):
    write_metrics(tmp_path, [1, 2])
    (tmp_path / "metrics.jsonl").open("a").write(json.dumps({"iteration": 2, "validation_loss/mmc4": 3.0}) + "\n")
    run = read_run(tmp_path)
    assert run.series("validation_loss/mmc4") == ([2], [3.0])
    assert run.series("loss") == ([1, 2], [1.0, 0.5])
    assert run.names("validation_loss/") == ["mmc4"]
    assert run.events == []


def test_sum_leaves_out_what_is_no_number(tmp_path):
    for value in (1.5, float("nan"), None, 2.5):
        write_metrics(tmp_path, [1 if value is None else int(4 * value) if value == value else 2], seconds=value)
    assert read_run(tmp_path).total("seconds") == 4.0


def test_events_are_those_recorded_and_in_order_of_time(tmp_path, monkeypatch):
    write_metrics(tmp_path, [1], seconds=2.0, unix_time=14.0)
    for unix_time, kind, details in ((0.0, START, {}), (12.0, BEGIN, {}), (20.0, END, {"exit_code": 1})):
        monkeypatch.setattr("time.time", lambda now=unix_time: now)
        record_event(tmp_path, kind, f"the {kind}", iteration=1, **details)
    write_exit_status(tmp_path / "exit_status.json", ExitStatus(exit_code=1, message="", unix_time=20.0))
    run = read_run(tmp_path)
    assert [(event.kind, event.unix_time) for event in run.events] == [("start", 0.0), ("begin", 12.0), ("end", 20.0)]
    assert (run.time_spent.steps, run.time_spent.start, run.time_spent.lost_steps) == (2.0, 12.0, 6.0)


def test_lines_of_both_files_that_a_kill_cut_short_are_counted(tmp_path):
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_text('{"iterat')
    assert read_run(tmp_path).unreadable_lines == 2


def test_a_checkpoint_that_a_kill_left_incomplete_is_an_event(tmp_path):
    write_metrics(tmp_path, [1])
    for iteration in (10, 20):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000010" / "manifest.json").write_text("{}")
    found = [(event.kind, event.iteration, event.what) for event in read_run(tmp_path).events]
    assert found == [("incomplete", 20, "iter_0000020 is incomplete")]


def test_the_end_of_a_run_that_no_launcher_recorded_is_told_by_its_exit_status(tmp_path):
    write_metrics(tmp_path, [1])
    record_event(tmp_path, BEGIN, "began", iteration=0)
    write_exit_status(
        tmp_path / "exit_status.json", ExitStatus(exit_code=71, message="a hang", iteration=24, unix_time=4e9)
    )
    run = read_run(tmp_path)
    found = [(event.iteration, event.what, dict(event.details)) for event in run.events]
    assert found == [(0, "began", {}), (24, "ended with exit code 71: a hang", {"exit_code": 71})]
    assert run.end.exit_code == 71


def test_reading_imports_no_torch():
    script = (
        "import sys, megatron_vlm.training.report, megatron_vlm.training.report_comparison; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
