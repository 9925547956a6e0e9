"""Signals, sent to real processes whose workers are busy for a minute."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_vlm.cli.stopping import stops_at_once

SCRIPT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has its children ignore
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.data.tasks.processes import run_tasks
with stops_at_once({kept!r}):
    run_tasks(time.sleep, [(60,)] * 4, num_workers=2, unit="naps")
"""
WITHOUT = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from megatron_vlm.data.tasks.processes import run_tasks
try:
    run_tasks(time.sleep, [(60,)] * 4, num_workers=2, unit="naps")
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def start_napping(script: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start the script, wait until its workers sleep, and return them, too."""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
        # A worker that naps has begun long ago and does nothing.
        if len(workers) == 2 and all(child.cpu_percent(0.3) == 0 for child in workers):
            return process, workers
    raise TimeoutError


def assert_soon_gone(workers: list[psutil.Process]) -> None:
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)], ids=lambda value: str(value)
)
def test_a_signal_ends_the_process_and_its_workers_at_once_with_one_line(number, code):
    process, workers = start_napping(SCRIPT.format(kept="finished files are kept"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors == f"megatron-vlm: stopped by {number.name}; run the same command again, finished files are kept\n"
    assert_soon_gone(workers)


def test_an_interrupt_ends_the_workers_of_a_program_that_answers_it_itself():
    process, workers = start_napping(WITHOUT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert_soon_gone(workers)


def test_handlers_and_warnings_are_put_back(monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with stops_at_once(""):
        assert signal.getsignal(signal.SIGTERM) not in before
        assert signal.getsignal(signal.SIGINT) in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert "PYTHONWARNINGS" not in os.environ


def test_what_the_caller_ignores_is_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stops_at_once("files are kept"):
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
