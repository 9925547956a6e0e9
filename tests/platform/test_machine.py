import dataclasses
import importlib.util
import os
import stat

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.hooks import profiler, wandb
from megatron_vlm.platform import machine
from megatron_vlm.platform.machine import (
    check_capability,
    check_requirements,
    count_cores,
    count_visible_gpus,
    find_capability,
    pick_backend,
)
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


@pytest.fixture
def driver_tool(tmp_path, monkeypatch):
    """Put a shell script in the place of nvidia-smi."""

    def install(script):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("script", "count"), [("echo 'GPU 0: A (UUID: x)'; echo 'GPU 1: A (UUID: y)'", 2), ("echo failed >&2; exit 9", 0)]
)
def test_driver_tool_is_asked_where_there_are_no_device_files(tmp_path, driver_tool, script, count):
    driver_tool(script)
    assert count_visible_gpus({}, tmp_path / "dev") == count


@pytest.mark.parametrize(
    ("script", "capability"),
    [("echo 8.0; echo ' 9.0'", (9, 0)), ("echo 10.0; echo 9.0", (10, 0)), ("echo 'N/A'", None), ("exit 9", None)],
)
def test_capability_is_the_highest_that_the_driver_tells(driver_tool, script, capability):
    driver_tool(script)
    assert find_capability() == capability


def test_capability_is_unknown_without_the_driver_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_capability() is None


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

    monkeypatch.setattr(machine, "find_capability", lambda: None)
    return install


def auto_run(**training):
    """Return a run with `model.backend=auto`."""
    config = tiny_run(training=training)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backend="auto"))


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
    config, machine = auto_run(fp8="hybrid"), {"num_gpus": 8, "num_workers": 8}
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


@pytest.mark.parametrize(("has_gpu", "is_there", "picked"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_auto_is_transformer_engine_on_a_gpu_with_the_library(transformer_engine, has_gpu, is_there, picked):
    transformer_engine(is_there)
    assert pick_backend("auto", has_gpu=has_gpu) == ("torch", "transformer_engine")[picked]
    assert pick_backend("torch", has_gpu=has_gpu) == "torch"


def test_fp8_with_the_layers_of_torch_is_refused(transformer_engine):
    transformer_engine(True)
    with pytest.raises(ConfigError, match=r"training.fp8=e4m3 needs the layers of transformer-engine.*is torch"):
        check_requirements(tiny_run(training={"fp8": "e4m3"}), num_gpus=8, num_workers=8)


@pytest.mark.parametrize(
    ("recipe", "capability", "message"),
    [
        ("tensorwise", (8, 9), None),
        ("tensorwise", (8, 0), r"fp8_recipe=tensorwise needs GPUs of compute capability 8.9, these have 8.0"),
        ("delayed", (8, 0), "remove training.fp8"),
        ("blockwise", (9, 0), None),
        ("blockwise", (8, 9), "set training.fp8_recipe=tensorwise"),
        ("mxfp8", (9, 0), r"needs GPUs of compute capability 10.0, these have 9.0"),
        ("mxfp8", (10, 0), None),
    ],
)
def test_fp8_recipes_need_their_gpus(transformer_engine, recipe, capability, message):
    transformer_engine(True)
    config = auto_run(fp8="hybrid", fp8_recipe=recipe)
    if message is None:
        check_capability(config, capability)
        check_capability(config, (capability[0] + 1, 0))
        return
    with pytest.raises(ConfigError, match=message):
        check_capability(config, capability)


def test_driver_is_asked_for_the_capability(transformer_engine, driver_tool, monkeypatch):
    transformer_engine(True)
    monkeypatch.setattr(machine, "find_capability", find_capability)
    config, gpus = auto_run(fp8="hybrid"), {"num_gpus": 8, "num_workers": 8}
    driver_tool("echo 9.0")
    assert is_accepted(config, **gpus)
    driver_tool("echo 8.0")
    assert not is_accepted(config, **gpus)
    assert is_accepted(auto_run(), **gpus)


@pytest.mark.parametrize(("installed", "accepted"), [("2.9.1", False), ("2.10.0a0+b4e4ee8", True), ("3.0.0", True)])
def test_layers_of_torch_need_its_attention_for_packed_samples_on_a_gpu(monkeypatch, installed, accepted):
    monkeypatch.setattr(machine, "version", lambda name: installed)
    monkeypatch.setattr(machine, "find_capability", lambda: None)
    in_bf16 = tiny_run(training={"precision": "bf16"})
    assert is_accepted(in_bf16, num_gpus=1, num_workers=1) == accepted
    assert is_accepted(in_bf16, num_gpus=0, num_workers=1)
    assert is_accepted(tiny_run(), num_gpus=1, num_workers=1)
    if not accepted:
        with pytest.raises(ConfigError, match=r"needs torch 2.10 for the attention.*this is 2.9.1"):
            check_requirements(in_bf16, num_gpus=1, num_workers=1)


@pytest.mark.parametrize(("is_there", "num_gpus", "is_warned"), [(False, 1, True), (True, 1, False), (False, 0, False)])
def test_slower_layers_are_not_chosen_in_silence(transformer_engine, caplog, is_there, num_gpus, is_warned):
    transformer_engine(is_there)
    check_requirements(auto_run(), num_gpus=num_gpus, num_workers=1)
    assert ["norms and RoPE are not fused" in record.message for record in caplog.records] == [True] * is_warned
    caplog.clear()
    check_requirements(tiny_run(), num_gpus=num_gpus, num_workers=1)  # the user chose them
    assert not caplog.records
