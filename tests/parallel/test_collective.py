import pytest

pytestmark = pytest.mark.distributed


def test_an_error_of_the_first_rank_is_raised_on_every_rank(workers):
    answers = workers.run("tests.support.jobs:fail_on_main", 2)
    assert answers == ["data is missing (shard 3); fix: prepare it"] * 2


def test_the_first_rank_is_done_before_the_others_begin_even_if_it_takes_longer_than_a_collective_may(
    workers, tmp_path
):
    assert workers.run("tests.support.jobs:write_then_read", 2, path=str(tmp_path / "file")) == ["built", "built"]


def test_all_ranks_have_the_answer_of_the_first(workers):
    assert workers.run("tests.support.jobs:decide", 2, fails=False) == ["rank 0", "rank 0"]


def test_an_error_of_the_deciding_rank_is_raised_on_every_rank(workers):
    assert workers.run("tests.support.jobs:decide", 2, fails=True) == ["nothing is there"] * 2


def test_a_rank_that_is_done_shows_life_while_another_gets_on_and_goes_on_with_it(workers):
    first, last = workers.run("tests.support.jobs:work_in_sight", 2, steps_of=[[], [0.25] * 6])
    assert (first.outcome, last.outcome) == ("done 0", "done 1")
    assert min(first.signs, last.signs) >= 4
    assert min(first.seconds, last.seconds) >= 1.5


def test_ranks_are_silent_while_the_one_that_they_wait_for_is(workers):
    first, last = workers.run("tests.support.jobs:work_in_sight", 2, steps_of=[[0.1] * 3, [2.0]])
    assert max(first.signs, last.signs) <= 4
    assert min(first.seconds, last.seconds) >= 2.0


def test_an_error_is_raised_once_all_are_done(workers):
    first, last = workers.run("tests.support.jobs:work_in_sight", 2, steps_of=[[0.5], []], fails=True)
    assert (first.outcome, last.outcome) == ("done 0", "failed")
    assert last.seconds >= 0.5


def test_after_too_many_silent_rounds_ranks_go_on_to_a_collective_with_a_time_limit(workers):
    first, last = workers.run("tests.support.jobs:work_in_sight", 2, steps_of=[[], [2.0]], rounds=3)
    assert first.seconds < 1.5
    assert last.seconds >= 2.0
