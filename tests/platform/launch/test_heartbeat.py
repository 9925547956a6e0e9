import signal
import subprocess
import sys
import time

from megatron_vlm.platform.launch import heartbeat
from megatron_vlm.platform.launch.heartbeat import Beat, Phase, beat, read_beat, stack_path

HANGING = """
import sys, time
from pathlib import Path
from megatron_vlm.platform.launch.heartbeat import Phase, beat, start_beating
start_beating(Path(sys.argv[1]), 3)
beat(Phase.STEP, iteration=7)
beat()
def hang():
    print("beating", flush=True)
    time.sleep(60)
hang()
"""


def test_rank_shows_what_it_does_and_writes_its_stack_when_asked(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HANGING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "beating\n"
        assert read_beat(tmp_path, 3) == Beat(count=3, phase=Phase.STEP, iteration=7)
        process.send_signal(heartbeat.STACK_SIGNAL)
        deadline = time.monotonic() + 10
        while "in hang" not in stack_path(tmp_path, 3).read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM  # the stack signal did not end it
    finally:
        process.kill()
        process.communicate()


def test_rank_that_has_not_begun_is_setting_up(tmp_path):
    assert read_beat(tmp_path, 0) == Beat(count=0, phase=Phase.MEETING, iteration=0)
    heartbeat.beat_path(tmp_path, 0).write_bytes(b"half")
    assert read_beat(tmp_path, 0) == Beat()


def test_process_without_a_launcher_beats_nowhere(monkeypatch):
    monkeypatch.setattr(heartbeat, "_pulse", None)
    beat(Phase.SAVE)
