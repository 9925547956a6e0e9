"""Where the time of a run went, computed by hand."""

import dataclasses

import pytest

from megatron_vlm.platform.files.events import Event
from megatron_vlm.training.goodput import Goodput, time_spent


def event(unix_time, kind, **details):
    return Event(kind=kind, unix_time=float(unix_time), what=kind, details=details)


def steps(first, times, seconds=2.0):
    return [{"iteration": first + n, "unix_time": float(time), "seconds": seconds} for n, time in enumerate(times)]


def parts(spent):
    return {name: value for name, value in dataclasses.asdict(spent).items() if value}


def test_a_run_that_ends_well():
    # 10 s of set-up; steps of 2 s at 12, 14, 20 (after 3 s of saving and 1 s of validation) and 22; 5 s to end.
    events = [
        event(0, "start"),
        event(10, "begin", lost_iterations=0, lost_seconds=0.0),
        event(17, "save", seconds=3.0),
        event(18, "validation", seconds=1.0),
        event(27, "end", exit_code=0),
    ]
    spent = time_spent(events, steps(1, [12, 14, 20, 22]))
    assert parts(spent) == {"steps": 8.0, "start": 10.0, "save": 3.0, "validation": 1.0, "other": 5.0}
    assert (spent.total, spent.goodput) == (27.0, pytest.approx(8 / 27))


KILLED = [
    event(0, "start"),
    event(10, "begin", lost_seconds=0.0),
    event(14, "save", seconds=0.0),
    # Steps 3 and 4 end at 16 and 18 and are lost; the fault is noticed at 21.
    event(21, "end", exit_code=1),
    event(30, "start"),
    event(40, "begin", lost_iterations=2, lost_seconds=4.0, lost_until=18.0),
    event(44, "end", exit_code=0),
]


def test_steps_that_are_done_again_are_lost_and_so_is_the_one_that_was_killed():
    spent = time_spent(KILLED, steps(1, [12, 14, 42, 44]))
    # 4 s of lost steps, 3 s until the fault was noticed, 19 s from there to the next step.
    assert parts(spent) == {"steps": 8.0, "lost_steps": 7.0, "start": 10.0, "restart": 19.0}
    assert spent.total == 44.0


def test_an_attempt_whose_launcher_was_killed_lasts_until_its_last_sign_of_life():
    events = [one for one in KILLED if one.unix_time != 21]
    spent = time_spent(events, steps(1, [12, 14, 42, 44]))
    assert parts(spent) == {"steps": 8.0, "lost_steps": 4.0, "start": 10.0, "restart": 22.0}


def test_a_start_that_did_not_come_to_a_step_is_part_of_the_restart():
    events = [*KILLED[:5], event(32, "end", exit_code=65), event(35, "start"), *KILLED[5:]]
    assert time_spent(events, steps(1, [12, 14, 42, 44])).restart == 19.0


def test_a_run_that_goes_on_lasts_until_its_last_step():
    spent = time_spent(KILLED[:2], steps(1, [12, 14]))
    assert parts(spent) == {"steps": 4.0, "start": 10.0}


def test_a_run_without_a_launcher_begins_with_its_first_step():
    assert parts(time_spent([event(10, "begin"), event(15, "save", seconds=1)], steps(1, [12, 14]))) == {
        "steps": 4.0,
        "save": 1.0,
    }


def test_steps_of_a_version_without_events_were_before_the_first_start():
    earlier = [{"iteration": 1, "seconds": 50.0}, {"iteration": 2, "seconds": 50.0}]
    damaged = {"iteration": 5, "unix_time": 14.0, "seconds": None}
    spent = time_spent(KILLED[:2], [*earlier, *steps(3, [12, 14]), damaged])
    assert parts(spent) == {"steps": 4.0, "start": 10.0}


def test_a_clock_that_is_set_back_in_a_failed_attempt_is_no_error():
    spent = time_spent([event(0, "start"), event(10, "begin"), event(7, "end", exit_code=1)], [])
    assert spent.lost_steps == 0.0


def test_nothing_is_told_before_the_first_step():
    assert time_spent([event(0, "start")], []) is None


def test_goodput_of_a_run_that_goes_on():
    goodput = Goodput(first_start=1000.0, seconds_in_steps=30.0)
    assert goodput.until(1060.0) == 0.5
    assert Goodput(1000.0, 0.0).until(1000.0) == 0.0
