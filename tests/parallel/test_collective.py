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
