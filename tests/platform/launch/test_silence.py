"""Ranks that hang, played by small processes; the time passes as the test says."""

import os
import re
import signal
import stat
import subprocess
import sys

import psutil
import pytest

from megatron_vlm.config.supervision import SupervisionConfig
from megatron_vlm.platform.launch import silence
from megatron_vlm.platform.launch.heartbeat import Phase, _Pulse
from megatron_vlm.platform.launch.silence import SilenceWatch

RANK = """
import subprocess, sys, time
from pathlib import Path
from megatron_vlm.platform.launch.heartbeat import Phase, beat, start_beating
start_beating(Path(sys.argv[1]), int(sys.argv[2]))
beat(Phase.STEP, iteration=5)
if "child" in sys.argv:
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
def hang():
    print("ready", flush=True)
    time.sleep(60)
hang()
"""
MINUTE = 60.0


@pytest.fixture
def clock(monkeypatch):
    """The time of the watch; `clock.pass_(seconds, watch, pids)` looks every quarter of a second."""

    class Clock:
        now = 1000.0

        def pass_(self, seconds, watch, pids, step=0.25):
            for _ in range(round(seconds / step)):
                self.now += step
                found = watch.look(pids)
                if found is not None:
                    return found
            return None

    clock = Clock()
    monkeypatch.setattr(silence.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(silence.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    monkeypatch.setattr(silence.shutil, "which", lambda name: None)
    return clock


@pytest.fixture
def start(tmp_path):
    """Start a process that beats as a rank and then hangs; `start(rank)` returns it."""
    started = []

    def start_rank(rank, *arguments):
        command = [sys.executable, "-c", RANK, str(tmp_path), str(rank), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start_rank
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def watch_of(folder, timeout_minutes=10.0, **limits):
    return SilenceWatch(folder, SupervisionConfig(**limits), timeout_minutes)


def wait_until_ready(process):
    assert process.stdout.readline() == "ready\n"


def test_stopped_rank_is_named_and_not_the_one_that_hangs_with_it(tmp_path, clock, start):
    ranks = {rank: start(rank) for rank in (0, 1)}
    for process in ranks.values():
        wait_until_ready(process)
    ranks[1].send_signal(signal.SIGSTOP)
    pids = {rank: process.pid for rank, process in ranks.items()}
    found = clock.pass_(40, watch_of(tmp_path, step_minutes=0.5), pids)
    assert (found.rank, found.is_stopped, found.iteration) == (1, True, 5)
    assert 30 <= found.seconds <= 32
    assert "it is stopped" in found.message
    assert "supervision.step_minutes" in found.message


def test_rank_that_hangs_is_named_with_its_stack(tmp_path, clock, start, monkeypatch):
    monkeypatch.undo()  # its stack takes real time
    process = start(0)
    wait_until_ready(process)
    found = watch_of(tmp_path).find_culprit({0: process.pid})
    assert not found.is_stopped
    assert not found.is_waiting
    assert re.search(r"it hangs in <string>:\d+ hang", found.message)
    assert "in hang" in found.stack


def test_stopped_process_that_a_rank_has_started_is_named(tmp_path, clock, start):
    process = start(0, "child")
    child = psutil.Process(int(process.stdout.readline()))
    child.suspend()
    found = watch_of(tmp_path).find_culprit({0: process.pid})
    assert f"process {child.pid}, which it started, is stopped" in found.message


def beating(folder, rank, *phases):
    pulse = _Pulse(folder / f"rank_{rank:05d}.beat")
    for phase in phases:
        pulse.beat(phase, 1)
    return pulse


def test_slow_rank_that_beats_is_left_alone(tmp_path, clock):
    pulse, watch = beating(tmp_path, 0, Phase.STEP), watch_of(tmp_path, step_minutes=1)
    for _ in range(20):
        assert clock.pass_(0.9 * MINUTE, watch, {0: 1}, step=1) is None
        pulse.beat(None, None)


def test_limit_of_a_step_grows_with_the_longest_silence_seen(tmp_path, clock):
    pulse, watch = beating(tmp_path, 0, Phase.STEP), watch_of(tmp_path, timeout_minutes=1)
    assert clock.pass_(40, watch, {0: 1}) is None
    pulse.beat(Phase.STEP, 2)
    assert clock.pass_(6 * MINUTE, watch, {0: 1}) is None  # of 10 times 40 s
    assert clock.pass_(MINUTE, watch, {0: 1}) is not None


def test_rank_that_waits_for_a_save_has_its_time(tmp_path, clock):
    beating(tmp_path, 0, Phase.STEP), beating(tmp_path, 1, Phase.SAVE)
    watch = watch_of(tmp_path, step_minutes=1, save_minutes=5)
    assert clock.pass_(4.9 * MINUTE, watch, {0: 1, 1: 1}) is None
    assert clock.pass_(0.2 * MINUTE, watch, {0: 1, 1: 1}) is not None


def test_rank_that_is_behind_is_named(tmp_path, clock):
    beating(tmp_path, 0, Phase.STEP).beat(Phase.STEP, 4)
    beating(tmp_path, 1, Phase.STEP).beat(Phase.STEP, 3)
    nobody = 2**22 + 1
    assert clock.pass_(70, watch_of(tmp_path, step_minutes=1), {0: nobody, 1: nobody}).rank == 1


def test_job_that_was_suspended_as_a_whole_has_not_hung(tmp_path, clock):
    beating(tmp_path, 0, Phase.STEP)
    watch = watch_of(tmp_path, step_minutes=1)
    assert clock.pass_(10, watch, {0: 1}) is None
    clock.now += 3600
    assert watch.look({0: 1}) is None
    assert clock.pass_(40, watch, {0: 1}) is None


def test_rank_whose_file_somebody_removes_is_not_accused(tmp_path, clock):
    beating(tmp_path, 0, Phase.STEP)
    watch = watch_of(tmp_path, step_minutes=1, setup_minutes=1)
    assert clock.pass_(10, watch, {0: 1}) is None
    (tmp_path / "rank_00000.beat").unlink()
    assert clock.pass_(3 * MINUTE, watch, {0: 1}) is None


def test_set_up_ends_with_the_first_step(tmp_path, clock):
    watch = watch_of(tmp_path)
    clock.pass_(1, watch, {0: 1})
    assert (watch.is_meeting(), watch.is_setting_up()) == (True, True)
    pulse = beating(tmp_path, 0, Phase.SETUP)
    clock.pass_(1, watch, {0: 1})
    assert (watch.is_meeting(), watch.is_setting_up()) == (False, True)
    pulse.beat(Phase.FIRST_STEP, 0)
    clock.pass_(1, watch, {0: 1})
    assert not watch.is_setting_up()


def test_py_spy_is_asked_first(tmp_path, monkeypatch):
    tool = tmp_path / "py-spy"
    tool.write_text(
        "#!/bin/sh\necho 'Thread 7 (idle): \"MainThread\"\n    all_reduce (torch/distributed/c10d.py:12)'\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = watch_of(tmp_path).find_culprit({0: 2**22 + 1})
    assert found.is_waiting
    assert "it waits for other ranks in c10d.py:12 all_reduce" in found.message
