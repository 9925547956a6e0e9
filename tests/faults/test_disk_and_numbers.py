"""Real jobs on a full disk, and with numbers that are not finite."""

import json
import resource

import pytest

from megatron_vlm.checkpoint.verify import inspect_checkpoint
from tests.support.training_jobs import (
    LONG,
    errors_of,
    exit_status,
    patched,
    ranks_of,
    wait_for_iteration,
)

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

ROOM = 200_000
"""More than metrics and ledger of these runs, and less than a rank's part of a checkpoint [bytes]."""


def checkpoints(project, run_dir):
    return sorted((project.folder / run_dir / "checkpoints").glob("iter_*"))


def test_full_disk_costs_no_checkpoint_and_ends_the_run_after_so_many_saves(project, start):
    process = start(
        "full", *LONG, "checkpoint.save_interval=1", "checkpoint.max_failed_saves=2", "--nproc-per-node", "2"
    )
    wait_for_iteration(project, "full", 3)
    for rank in ranks_of(process).values():
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 74, errors
    (line,) = errors_of(errors)
    assert "2 saves in a row failed, the last: " in line
    assert exit_status(project, "full")["exit_code"] == 74
    latest = (project.folder / "full" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    kept = checkpoints(project, "full")
    assert kept[-1].name == f"iter_{int(latest):07d}"
    assert all(inspect_checkpoint(one, read_files=True).is_valid for one in kept)
    again = start("full", f"training.exit_iteration={int(latest) + 2}", *LONG, "--nproc-per-node", "2")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors


NOT_FINITE = """
import os

if os.environ.get("RANK") == "1":
    from megatron_vlm.training.batch_counts import BatchCounts

    add, calls = BatchCounts.add, []

    def spoil_from_the_fourth_step_on(self, batch):
        from megatron_vlm.training.objectives.language_modelling import Objective

        calls.append(batch)
        if len(calls) == 7:  # two in a step
            reduce = Objective.reduce

            def spoiled(self, output, *arguments, **named):
                return reduce(self, output * float("nan"), *arguments, **named)

            Objective.reduce = spoiled
        add(self, batch)

    BatchCounts.add = spoil_from_the_fourth_step_on
"""


def test_loss_that_is_not_finite_on_one_rank_ends_the_run_and_reaches_no_checkpoint(project, start):
    arguments = (*LONG, "checkpoint.save_interval=1", "--nproc-per-node", "2")
    process = start("nan", *arguments, **patched(project, NOT_FINITE))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 70, errors
    (line,) = errors_of(errors)
    assert "loss is nan at iteration 4" in line
    records = [json.loads(text) for text in (project.folder / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    kept = checkpoints(project, "nan")
    assert [one.name for one in kept] == ["iter_0000002", "iter_0000003"]
    assert all(inspect_checkpoint(one, read_files=True).is_valid for one in kept)
