"""Runs that are killed at random moments, and started again, end as if nobody had disturbed them.

A part runs always; `-m faults` runs all: 40 kills, about 8 minutes on 2 quiet cores.
"""

import pytest

from tests.support.killed_runs import KilledRun, kills_of
from tests.support.project import make_project

SEEDS = range(40)
FEW = (28, 15, 6)
"""A rank in a save, everything in a prune, a loader worker in a step with asynchronous saves."""

pytestmark = pytest.mark.distributed


def kill_and_compare(folder, seeds, iterations):
    project = make_project(folder)
    reference, killed = (KilledRun(project, name, iterations) for name in ("reference", "killed"))
    reference.finish()
    for kill in kills_of(seeds):
        killed.kill(kill)
    killed.finish()
    killed.assert_equal(reference)


def test_seeds_meet_every_moment_with_every_victim_and_both_kinds_of_saves():
    kills = kills_of(SEEDS)
    assert len({(kill.moment, kill.victim, kill.is_async) for kill in kills}) == len(SEEDS)


def test_run_that_is_killed_three_times_is_equal_to_the_bit(tmp_path):
    kill_and_compare(tmp_path, FEW, iterations=24)


@pytest.mark.faults
def test_run_that_is_killed_forty_times_is_equal_to_the_bit(tmp_path):
    kill_and_compare(tmp_path, SEEDS, iterations=240)
