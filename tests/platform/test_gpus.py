import os
import stat

import pytest

from megatron_vlm.platform.gpus import count_visible_gpus


@pytest.fixture
def four_gpus(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def test_device_files_are_counted_without_the_drivers_own(four_gpus):
    assert count_visible_gpus({}, four_gpus) == 4


@pytest.mark.parametrize(("visible", "count"), [("0,2", 2), ("3", 1), ("", 0), ("-1", 0), ("GPU-1a2b,GPU-3c4d", 2)])
def test_cuda_visible_devices_narrows_the_count(four_gpus, visible, count):
    assert count_visible_gpus({"CUDA_VISIBLE_DEVICES": visible}, four_gpus) == count


def test_machine_without_a_gpu_has_none_whatever_is_made_visible(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0


@pytest.mark.parametrize(
    ("script", "count"), [("echo 'GPU 0: A (UUID: x)'; echo 'GPU 1: A (UUID: y)'", 2), ("echo failed >&2; exit 9", 0)]
)
def test_driver_tool_is_asked_where_there_are_no_device_files(tmp_path, monkeypatch, script, count):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert count_visible_gpus({}, tmp_path / "dev") == count
