import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quickstart.kill import find_rank, kill_rank

# Starts two processes that say their rank, as a launcher does, and ends with 1 when one of them has died.
LAUNCHER = """
import os, subprocess, sys, time
run, lines = sys.argv[1:]
ranks = [
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, "RANK": str(rank)})
    for rank in range(2)
]
os.makedirs(run)
for iteration in range(1, int(lines) + 1):
    with open(f"{run}/metrics.jsonl", "a") as stream:
        stream.write('{"iteration": %d}\\n' % iteration)
    time.sleep(0.01)
while all(rank.poll() is None for rank in ranks) and int(lines) >= 5:
    time.sleep(0.01)
for rank in ranks:
    rank.kill()
sys.exit(1)
"""


def launch(run: Path, lines: int) -> list[str]:
    return [sys.executable, "-c", LAUNCHER, str(run), str(lines)]


def test_rank_is_killed_when_the_iteration_is_done(tmp_path: Path) -> None:
    facts = kill_rank(launch(tmp_path / "run", 10), tmp_path / "run", rank=1, after=5)
    assert (facts["rank"], facts["exit_code"]) == (1, 1)
    assert max(record["iteration"] for record in facts["killed"]) >= 5
    assert 0 <= facts["seconds_to_end"] < 30


def test_run_that_ends_before_the_kill_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended before iteration 5, at which rank 1 was to be killed"):
        kill_rank(launch(tmp_path / "run", 3), tmp_path / "run", rank=1, after=5)


def test_process_without_ranks_has_none() -> None:
    assert find_rank(os.getpid(), 0) is None


def test_training_ends_with_the_command_that_was_to_kill_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quickstart.kill", str(tmp_path / "run"), "--rank", "1", "--after", "99"]
    command += ["--facts", str(tmp_path / "facts.json"), "--", *launch(tmp_path / "run", 10)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher = next(int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _parent(folder) == process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{launcher}").exists()
    assert not (tmp_path / "facts.json").exists()


def _parent(folder: Path) -> int | None:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
