import faulthandler
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from megatron_vlm.cli import worker
from megatron_vlm.config import ConfigError
from megatron_vlm.platform.launch import exit_status


@pytest.fixture
def rank(project, monkeypatch, tmp_path):
    """Run the worker in this process: `rank(train, *arguments)`; `train(config)` stands for the training."""
    monkeypatch.setattr(worker, "setup_logging", lambda *args, **settings: None)
    monkeypatch.setattr(faulthandler, "enable", lambda: None)
    monkeypatch.setattr(worker, "start_beating", lambda folder, rank: None)
    monkeypatch.setattr(worker, "keep_helpers_in", lambda folder: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")

    def run(train, *arguments):
        monkeypatch.setitem(sys.modules, "megatron_vlm.training.run", SimpleNamespace(run_training=train))
        return worker.main([str(project.config), f"run_dir={tmp_path}", *arguments])

    return run


def raising(error):
    def train(config):
        raise error

    return train


def reported(folder):
    return json.loads((folder / "rank_00003.json").read_text())


def test_report_says_how_the_rank_ended(rank, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 6}\n{"iteration": 7}\n')
    error = ConfigError("bad", fix="good")
    assert rank(raising(error), "--report-folder", str(tmp_path)) == 78
    report = reported(tmp_path)
    assert (report["exit_code"], report["message"], report["rank"], report["iteration"]) == (78, "bad; fix: good", 3, 7)
    assert capsys.readouterr().err == ""


def test_traceback_of_a_crash_goes_into_the_report(rank, tmp_path, capsys):
    assert rank(raising(ZeroDivisionError("x")), "--report-folder", str(tmp_path)) == 1
    assert "ZeroDivisionError" in reported(tmp_path)["traceback"]
    assert capsys.readouterr().err == ""


def test_run_that_was_stopped_asks_to_be_requeued(rank, tmp_path):
    assert rank(lambda config: "signalled", "--report-folder", str(tmp_path)) == 75
    assert reported(tmp_path)["message"].startswith("stopped by a signal after saving a checkpoint")


def test_run_whose_time_is_over_asks_to_be_requeued(rank, tmp_path):
    limit = "training.exit_duration_minutes=1e-6"
    assert rank(lambda config: "signalled", limit, "--report-folder", str(tmp_path)) == 75
    assert reported(tmp_path)["message"].startswith("stopped at training.exit_duration_minutes=1e-06 after saving")


@pytest.mark.parametrize("result", [None, "exit_iteration"])
def test_run_that_came_to_its_end_is_done(rank, tmp_path, result):
    assert rank(lambda config: result, "--report-folder", str(tmp_path)) == 0


def test_wrong_settings_are_reported_too(rank, tmp_path):
    assert rank(lambda config: None, "bogus=1", "--report-folder", str(tmp_path)) == 78
    assert "unknown key bogus" in reported(tmp_path)["message"]


def test_rank_without_a_launcher_tells_the_console_and_the_run_folder(rank, tmp_path, capsys):
    assert rank(raising(ConfigError("bad"))) == 78
    assert capsys.readouterr().err == "megatron-vlm: error: bad\n"
    assert exit_status.read_exit_status(tmp_path / "exit_status.json").exit_code == 78


def test_rank_whose_report_cannot_be_written_tells_the_console(rank, tmp_path, capsys):
    assert rank(raising(ConfigError("bad")), "--report-folder", str(tmp_path / "gone")) == 78
    assert capsys.readouterr().err.splitlines()[-1] == "megatron-vlm: error: bad"


def test_half_written_line_of_the_metrics_is_passed_over(rank, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 6}\n{"itera')
    assert rank(lambda config: None, "--report-folder", str(tmp_path)) == 0
    assert reported(tmp_path)["iteration"] == 6


def test_rank_is_tied_to_its_launcher(rank, tmp_path, monkeypatch):
    tied_to = []
    monkeypatch.setattr(worker, "die_with_parent", tied_to.append)
    rank(lambda config: None, "--report-folder", str(tmp_path), "--launcher-pid", str(os.getppid()))
    assert tied_to == [os.getppid()]
