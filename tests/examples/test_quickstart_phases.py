import sys
import time
from pathlib import Path
from typing import Any

import pytest
from quickstart.phases import PhaseRunner
from quickstart.processes import CommandError, last_line, run_command, start_command


class Job:
    """An action that counts how often it ran and what it found in its output folder."""

    def __init__(self, output: Path) -> None:
        self.output, self.runs, self.found = output, 0, []

    def __call__(self) -> dict[str, Any]:
        self.output.mkdir(exist_ok=True)
        self.found = sorted(path.name for path in self.output.iterdir())
        self.runs += 1
        (self.output / "result").write_text("done")
        return {"answer": 42}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "output")


def run(tmp_path: Path, job: Any, inputs: list[Any], name: str = "phase", **options: Any) -> dict[str, Any]:
    runner = PhaseRunner(folder=tmp_path / "phases", num_phases=1, say=lambda line: None)
    return runner.run(name, job, inputs=inputs, outputs=[tmp_path / "output"], **options)


def test_finished_phase_is_not_done_again(tmp_path: Path, job: Job) -> None:
    assert run(tmp_path, job, [1]) == run(tmp_path, job, [1]) == {"answer": 42}
    assert job.runs == 1


def test_phase_is_done_again_when_an_input_changes(tmp_path: Path, job: Job) -> None:
    run(tmp_path, job, [1])
    run(tmp_path, job, [2])
    assert job.runs == 2


def test_content_of_an_input_file_counts(tmp_path: Path, job: Job) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: 1")
    run(tmp_path, job, [file])
    file.write_text("a: 2")
    run(tmp_path, job, [file])
    assert job.runs == 2


def test_phase_is_done_again_when_its_output_is_gone(tmp_path: Path, job: Job) -> None:
    run(tmp_path, job, [1])
    (tmp_path / "output" / "result").unlink()
    (tmp_path / "output").rmdir()
    run(tmp_path, job, [1])
    assert job.runs == 2


def test_output_of_other_inputs_is_removed_first(tmp_path: Path, job: Job) -> None:
    run(tmp_path, job, [1])
    run(tmp_path, job, [2])
    assert job.found == []


def test_output_of_an_interrupted_phase_is_kept(tmp_path: Path, job: Job) -> None:
    def interrupted() -> dict[str, Any]:
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted, [1])
    run(tmp_path, job, [1])
    assert job.found == ["checkpoint"]


def test_phase_follows_the_inputs_of_those_before_it(tmp_path: Path, job: Job) -> None:
    for first_input in (1, 1, 2):
        runner = PhaseRunner(folder=tmp_path / "phases", num_phases=2, say=lambda line: None)
        runner.run("first", dict, inputs=[first_input])
        runner.run("second", job, inputs=[], after=["first"], outputs=[tmp_path / "output"])
    assert job.runs == 2


def test_failed_command_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="exit code 3; the end of .*\n  what went wrong"):
        run_command([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], tmp_path / "log")


def test_command_that_is_left_ends_with_its_children(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); child.wait()"
    )
    log = tmp_path / "log"
    with start_command([sys.executable, "-c", script], log) as process:
        deadline = time.monotonic() + 20
        while not last_line(log) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(last_line(log))
    assert process.poll() is not None
    deadline = time.monotonic() + 5
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def test_last_state_of_a_progress_bar_is_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("start\n 10%|#\r 20%|##\r\n\n")
    assert last_line(log) == "20%|##"


def test_missing_log_has_no_last_line(tmp_path: Path) -> None:
    assert last_line(tmp_path / "log") == ""
