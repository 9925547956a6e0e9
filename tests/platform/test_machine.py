import dataclasses
import importlib.util
import os
import stat

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.hooks import profiler, wandb
from megatron_vlm.platform.machine import check_requirements, count_cores, count_visible_gpus
from tests.support.configs import tiny_run


def test_cores_are_those_that_the_process_is_bound_to():
    bound = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(bound)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, bound)
    assert count_cores() == len(bound)


def test_cores_are_all_of_the_machine_where_processes_cannot_be_bound(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores() == os.cpu_count()


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


@pytest.fixture
def transformer_engine(monkeypatch):
    """Say that the library is installed or not: `transformer_engine(True)`."""
    find_spec = importlib.util.find_spec

    def install(is_there):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if is_there else None) if name == "transformer_engine" else find_spec(name),
        )

    return install


def test_fp8_without_transformer_engine_is_refused(transformer_engine):
    transformer_engine(False)
    with pytest.raises(ConfigError, match=r"training.fp8=hybrid needs transformer-engine, which is not installed"):
        check_requirements(tiny_run(training={"fp8": "hybrid"}), num_gpus=8, num_workers=8)


def test_fp8_without_a_gpu_is_refused(transformer_engine):
    transformer_engine(True)
    with pytest.raises(ConfigError, match=r"training.fp8=hybrid needs a GPU.*remove training.fp8"):
        check_requirements(tiny_run(training={"fp8": "hybrid"}), num_gpus=0, num_workers=1)


def is_accepted(config, **machine):
    try:
        check_requirements(config, **machine)
    except ConfigError:
        return False
    return True


def test_fp8_is_accepted_where_both_are_there(transformer_engine):
    config, machine = tiny_run(training={"fp8": "hybrid"}), {"num_gpus": 8, "num_workers": 8}
    transformer_engine(True)
    assert is_accepted(config, **machine)
    assert not is_accepted(config, **{**machine, "num_gpus": 0})
    transformer_engine(False)
    assert not is_accepted(config, **machine)


def test_transformer_engine_backend_without_the_library_is_refused(transformer_engine):
    transformer_engine(False)
    config = dataclasses.replace(tiny_run(), model=dataclasses.replace(tiny_run().model, backend="transformer_engine"))
    with pytest.raises(ConfigError, match=r"model.backend=transformer_engine needs transformer-engine"):
        check_requirements(config, num_gpus=8, num_workers=8)


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"8 ranks on a node with 4 visible GPUs.*--nproc-per-node 4"):
        check_requirements(tiny_run(), num_gpus=4, num_workers=8)


@pytest.mark.parametrize(("num_gpus", "accepted"), [(0, True), (7, False), (8, True)])
def test_ranks_need_a_gpu_each_or_none_at_all(num_gpus, accepted):
    assert is_accepted(tiny_run(), num_gpus=num_gpus, num_workers=8) == accepted


def test_hook_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny_run(training={"hooks": (wandb.Config(project="p"),)})
    with pytest.raises(ConfigError, match=r"training.hooks names wandb, which needs wandb; it is not installed"):
        check_requirements(config, num_gpus=0, num_workers=1)


def test_hook_that_needs_no_package_is_accepted():
    config = tiny_run(training={"hooks": (profiler.Config(iterations=(1,)),)})
    check_requirements(config, num_gpus=0, num_workers=1)
    assert profiler.Config.package is None
