import json

import pytest

from megatron_vlm.training.hooks.metrics_file import Hook
from tests.support.states import METRICS, make_state


def write(run_dir, resumed, iterations, **changes):
    hook = Hook()
    hook.start(make_state(run_dir, resumed))
    for iteration in iterations:
        hook.step(make_state(run_dir, iteration, **changes), METRICS)
    hook.close(make_state(run_dir))


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_iteration_are_replaced(tmp_path):
    write(tmp_path, 0, range(1, 6), consumed_samples=0)
    write(tmp_path, 3, range(4, 7), consumed_samples=3)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["consumed_samples"] for line in lines(tmp_path)] == [0, 0, 0, 3, 3, 3]


def test_a_line_cut_short_by_a_kill_goes(tmp_path):
    write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 4, "lo')
    write(tmp_path, 3, [4])
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4]


DAMAGED = [
    b"[]",
    b"5",
    b"null",
    b'{"iteration": null}',
    b'{"loss": 1}',
    b"\xff\xfe\x80{",
    b"\0" * 64,
    b"[" * 100_000,
    b"9" * 5000,
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_goes_and_the_others_stay(tmp_path, line):
    write(tmp_path, 0, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    write(tmp_path, 2, [3])
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    hook, state = Hook(), make_state(tmp_path, 1, is_reporter=False)
    hook.start(state)
    hook.step(state, METRICS)
    hook.close(state)
    assert not list(tmp_path.iterdir())
