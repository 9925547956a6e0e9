import json

from megatron_vlm.cli.main import main
from megatron_vlm.config import ExitCode
from megatron_vlm.platform.files.durable import UNFINISHED


def test_report_is_written_into_the_run_folder(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "loss": 2.0}) + "\n")
    assert main(["report", str(tmp_path)]) == ExitCode.DONE
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_report_is_written_where_it_is_asked_for(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "loss": 2.0}) + "\n")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == ExitCode.DONE
    assert (tmp_path / "page.html").exists()


def test_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == ExitCode.BAD_DATA
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


def test_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "loss": 2.0}) + "\n")
    (tmp_path / f"report.html{UNFINISHED}").mkdir()
    assert main(["report", str(tmp_path)]) == ExitCode.STORAGE
    assert "report cannot be written" in capsys.readouterr().err
