"""run.sh without its commands: stand-ins on the PATH write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_vlm.config import TrainConfig, derive_layout, load_config

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = """corpora prepare_coyo prepare_mmc4 prepare_llava verify_coyo verify_mmc4 verify_llava align pretrain_straight
pretrain_killed pretrain sft convert logits_here logits_transformers evaluate evaluate_another_picture report_align
report_pretrain report_sft""".split()
STAND_IN = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$CALLS"
echo "${CUDA_VISIBLE_DEVICES-all}" >>"$CALLS.gpus"
case "$*" in *"$FAIL"*) exit 65 ;; esac
"""


class Script:
    """run.sh with stand-ins for `python` and `megatron-vlm`."""

    def __init__(self, folder: Path) -> None:
        self.output, self._calls, self._bin = folder / "output", folder / "calls", folder / "bin"
        self._bin.mkdir()
        for name in ("python", "megatron-vlm"):
            (self._bin / name).write_text(STAND_IN)
            (self._bin / name).chmod(0o755)

    def __call__(self, *options: str, fail: str = "never") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CALLS": str(self._calls), "FAIL": fail, "CUDA_VISIBLE_DEVICES": "0"}
        environment["PATH"] = f"{self._bin}:{environment['PATH']}"
        self._calls.write_text("")
        command = ["bash", str(QUICKSTART / "run.sh"), "--installed", "--output", str(self.output), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split() for line in self._calls.read_text().splitlines()]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_steps_run_in_order_and_once(script: Script) -> None:
    first = script()
    assert first.returncode == 0, first.stderr
    begun = [line[1:].split("]")[0] for line in first.stdout.splitlines() if line.startswith("[")]
    assert begun == STEPS
    assert len(script.calls) == len(STEPS) + 1  # and the check
    second = script()
    assert second.stdout.count("done before") == len(STEPS)
    assert script.calls == [["python", "-m", "quickstart.check", str(script.output)]]


def test_no_step_sees_a_gpu(script: Script) -> None:
    assert script().returncode == 0
    assert set(Path(f"{script._calls}.gpus").read_text().splitlines()) == {""}


def test_failed_step_ends_the_script_with_its_exit_code_and_is_done_again(script: Script) -> None:
    failed = script(fail="data verify")
    assert failed.returncode == 65
    assert "[verify_coyo] ended with exit code 65; log: " in failed.stderr
    assert script().returncode == 0
    assert script.calls[0][:3] == ["megatron-vlm", "data", "verify"]


def test_missed_bar_is_the_exit_code(script: Script) -> None:
    assert script(fail="quickstart.check").returncode == 65


def test_fresh_forgets_all_but_the_downloads(script: Script) -> None:
    script()
    (script.output / "downloads").mkdir()
    assert "done before" not in script("--fresh").stdout
    assert (script.output / "downloads").is_dir()


def test_folder_of_other_settings_is_refused(script: Script) -> None:
    script()
    refused = script("--smoke")
    assert refused.returncode == 64
    assert "holds a run with other settings; start over with --fresh" in refused.stderr
    assert script.calls == []


def test_unknown_option_is_refused(script: Script) -> None:
    refused = script("--smok")
    assert refused.returncode == 64
    assert "unknown option --smok; usage: run.sh" in refused.stderr


def test_output_folder_stands_for_the_one_of_the_yaml_files(script: Script) -> None:
    script()
    config = load_config(TrainConfig, script.output / "configs" / "pretrain.yaml")
    paths = [config.run_dir, config.data.tokenizer, config.checkpoint.load_weights]
    paths += [entry.path for entry in config.data.blend]
    assert all(str(path).startswith(f"{script.output}/") for path in paths)
    original = load_config(TrainConfig, QUICKSTART / "pretrain.yaml")
    assert [entry.images for entry in config.data.blend] == [entry.images for entry in original.data.blend] == [1, 1]


def stages(script: Script) -> dict[str, tuple[TrainConfig, int]]:
    """Return config and number of processes of each training, by run folder."""
    found = {}
    for call in script.calls:
        if "train" not in call:
            continue
        start = call.index("train")
        overrides = [word for word in call[start + 2 :] if "=" in word]
        config = load_config(TrainConfig, call[start + 1], overrides)
        found[Path(config.run_dir).name] = (config, int(call[call.index("--nproc-per-node") + 1]))
    return found


@pytest.mark.parametrize(("options", "processes"), [((), 4), (("--smoke",), 2)])
def test_every_stage_fits_its_processes(script: Script, options: tuple[str, ...], processes: int) -> None:
    script(*options)
    found = stages(script)
    assert found.keys() == {"align", "pretrain_straight", "pretrain", "sft"}
    for config, number in found.values():
        assert number == processes
        assert derive_layout(config, number).data_parallel_size == 1


@pytest.mark.parametrize("options", [(), ("--smoke",)])
def test_kill_comes_after_a_checkpoint_and_within_the_uninterrupted_run(
    script: Script, options: tuple[str, ...]
) -> None:
    script(*options)
    (kill,) = (call for call in script.calls if "quickstart.kill" in call)
    after = int(kill[kill.index("--after") + 1])
    config, straight = stages(script)["pretrain"][0], stages(script)["pretrain_straight"][0]
    assert config.checkpoint.save_interval < after < straight.training.exit_iteration < config.training.train_iters
    assert after % config.checkpoint.save_interval


def test_example_is_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in QUICKSTART.rglob("*.py")) < 700
