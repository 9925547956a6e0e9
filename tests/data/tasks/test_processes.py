import os
import signal

import pytest

from megatron_vlm.config import DataError, StorageError
from megatron_vlm.data.tasks.processes import run_tasks


def square(value: int) -> int:
    return value * value


def square_reporting(value: int, report) -> int:
    report(value, 1)
    return value * value


def kill_itself(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def refuse(value: int) -> int:
    raise DataError(f"value {value} is wrong", where="here", fix="another")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    tasks = [(value,) for value in range(10)]
    assert run_tasks(square, tasks, num_workers=workers, unit="values") == [value * value for value in range(10)]
    reported = run_tasks(square_reporting, tasks, num_workers=workers, unit="values", reports=True)
    assert reported == [value * value for value in range(10)]


def test_no_task_is_no_result():
    assert run_tasks(square, [], num_workers=4, unit="values") == []


def test_killed_worker_is_an_error_that_says_what_to_do():
    with pytest.raises(StorageError, match="a worker process was killed.*fix: run the same command again"):
        run_tasks(kill_itself, [(1,), (2,)], num_workers=2, unit="values")


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_arrives_as_it_was_raised(workers):
    with pytest.raises(DataError, match="value 1 is wrong .here.; fix: another"):
        run_tasks(refuse, [(1,), (1,)], num_workers=workers, unit="values")
