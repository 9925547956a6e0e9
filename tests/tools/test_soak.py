"""The soak: what it counts, and a short one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import make_project

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))

import soak  # noqa: E402
from watched_job import KeptCheckpoints, Losses  # noqa: E402


def write_metrics(run_dir, **losses):
    lines = [json.dumps({"iteration": int(name[1:]), "loss_hex": value}) for name, value in losses.items()]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))


def test_iteration_that_is_done_twice_with_another_loss_is_a_contradiction(tmp_path):
    losses = Losses()
    write_metrics(tmp_path, i1="a", i2="b")
    assert losses.read(tmp_path) == 2
    write_metrics(tmp_path, i1="a", i2="c", i3="d")
    assert losses.read(tmp_path) == 3
    assert losses.values == {1: "a", 2: "b", 3: "d"}
    assert losses.contradictions == ["iteration 2: b, then c"]


def test_checkpoint_may_be_removed_for_newer_ones_and_never_change(tmp_path, monkeypatch):
    def now(**hashes):
        monkeypatch.setattr(
            KeptCheckpoints, "of", lambda run_dir: KeptCheckpoints(run_dir, {int(k[1:]): v for k, v in hashes.items()})
        )

    before = KeptCheckpoints(tmp_path, {4: {"a": "x"}, 6: {"a": "y"}})
    now(i6={"a": "y"}, i8={"a": "z"})
    assert before.harm(keep_last=2) == []
    now(i6={"a": "y"})
    assert before.harm(keep_last=2) == ["checkpoint 4 was removed, and only [6] are left"]
    now(i4={"a": "x"}, i6={"a": "z"})
    assert before.harm(keep_last=2) == ["checkpoint 6 has changed"]


def test_report_has_a_row_for_each_kind_and_the_goodput():
    faults = [
        soak.Fault(kind="kill", victim="rank", iteration=9, found=1.0, exit_code=1, restarted=6.0, lost=2),
        soak.Fault(kind="kill", victim="all", iteration=9, found=0.2, exit_code=-9, restarted=8.0, lost=4),
        soak.Fault(kind="full disk", victim="all ranks", iteration=9, found=10.0),
    ]
    lines = soak.describe(faults, useful=30.0, wall=120.0)
    assert lines[1].split() == ["kill", "2", "0.6", "(1.0)", "7.0", "(8.0)", "3.0", "(4.0)"]
    assert lines[4].split() == ["full", "disk", "1", "10.0", "(10.0)", "-", "-"]
    assert lines[2].split() == ["stop", "0", "-", "-", "-"]
    assert lines[-1] == "3 faults in 120 s; goodput 25.0% (30 s in steps that count)"


@pytest.mark.faults
@pytest.mark.distributed
def test_short_soak_ends_equal_to_the_bit(tmp_path):
    project = make_project(tmp_path)
    settings = ("training.train_iters=100000", "checkpoint.save_interval=5", "optimizer.lr=1e-4")
    command = [sys.executable, str(TOOLS / "soak.py"), "train.yaml", "--output", "out", *settings]
    command += ["--minutes", "0.7", "--every", "5", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=project.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert facts["faults"]
    assert not facts["wrong"]
    assert "losses and samples equal to the bit" in done.stdout
