import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from megatron_vlm.config import DataError
from megatron_vlm.platform.launch.exit_status import ExitStatus, write_exit_status
from megatron_vlm.training.run_records import read_run


def write_metrics(run_dir: Path, iterations, **values) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        for iteration in iterations:
            stream.write(json.dumps({"iteration": iteration, "loss": 1.0 / iteration, **values}) + "\n")


def write_tensorboard(run_dir: Path, second: int, events: list[Event]) -> Path:
    folder = run_dir / "tensorboard"
    folder.mkdir(exist_ok=True)
    path = folder / f"events.out.tfevents.{second}.host.1.0"
    records = [event.SerializeToString() for event in events]
    path.write_bytes(b"".join(len(record).to_bytes(8, "little") + b"crc." + record + b"crc." for record in records))
    return path


def start_of(first: int) -> list[Event]:
    """Return what a writer that goes on with an iteration writes first."""
    return [
        Event(file_version="brain.Event:2"),
        Event(step=first, session_log=SessionLog(status=SessionLog.START)),
    ]


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


def test_later_record_of_an_iteration_counts(tmp_path):
    write_metrics(tmp_path, range(1, 6), tokens=1)
    write_metrics(tmp_path, range(4, 8), tokens=2)
    run = read_run(tmp_path)
    assert run.series("tokens") == ([1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 2, 2, 2, 2])
    (event,) = run.events
    assert (event.what, event.iteration, event.is_resume) == ("went back from iteration 5 to 3", 3, True)


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


def test_each_tensorboard_file_is_a_start(tmp_path):
    write_metrics(tmp_path, [1])
    write_tensorboard(tmp_path, 1000, start_of(1))
    write_tensorboard(tmp_path, 2000, start_of(101))
    found = [(event.what, event.unix_time, event.is_resume) for event in read_run(tmp_path).events]
    assert found == [("started", 1000.0, False), ("resumed after iteration 100", 2000.0, True)]


@pytest.mark.parametrize("keep", [0, 5, 30, 45])
def test_tensorboard_file_that_a_kill_cut_short_is_a_start_all_the_same(tmp_path, keep):
    write_metrics(tmp_path, [1])
    path = write_tensorboard(tmp_path, 1000, start_of(101))
    path.write_bytes(path.read_bytes()[:keep])
    assert [(event.what, event.iteration) for event in read_run(tmp_path).events] == [("started", None)]


def test_damaged_tensorboard_file_is_a_start_all_the_same(tmp_path):
    write_metrics(tmp_path, [1])
    path = write_tensorboard(tmp_path, 1000, start_of(101))
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])  # a length of 2^63 bytes
    assert [(event.what, event.iteration) for event in read_run(tmp_path).events] == [("started", None)]


def test_checkpoints_and_end_are_events_in_order_of_time(tmp_path):
    write_metrics(tmp_path, [1])
    for iteration in (10, 20):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000010" / "manifest.json").write_text("{}")
    write_exit_status(
        tmp_path / "exit_status.json", ExitStatus(exit_code=71, message="a hang", iteration=24, unix_time=4e9)
    )
    run = read_run(tmp_path)
    found = [(event.iteration, event.what) for event in run.events]
    assert sorted(found[:2]) == [(10, "saved iter_0000010"), (20, "iter_0000020 is incomplete")]
    assert found[2:] == [(24, "ended with exit code 71: a hang")]
    assert run.end.exit_code == 71


def test_reading_imports_no_torch():
    script = (
        "import sys, megatron_vlm.training.report, megatron_vlm.training.run_records; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
