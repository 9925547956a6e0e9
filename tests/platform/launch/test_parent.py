import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_vlm.platform.launch.parent import die_with_parent

CHILD = """
import os, sys, time
from megatron_vlm.platform.launch.parent import die_with_parent
die_with_parent(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid())
print("alive", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel call is Linux's")


def test_process_dies_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "alive\n"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=5)
    parent.stdout.close()
    assert not alive


def test_process_dies_when_its_parent_is_gone_already():
    somebody_else = 1
    child = subprocess.run([sys.executable, "-c", CHILD, str(somebody_else)], timeout=30, check=False)
    assert child.returncode == -signal.SIGKILL


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    started = time.monotonic()
    die_with_parent(1)
    assert time.monotonic() - started < 1
