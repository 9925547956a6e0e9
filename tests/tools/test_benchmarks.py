"""The benchmarks run and report results, peers and whether the requirements are met."""

import itertools
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.training.state import TrainState

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
FIELDS = {"work", "unit", "ours", "peers", "ratio", "required", "met"}
SPEEDS = " per CPU second"
SHARE = "of the positions used"


def run(tmp_path, name, *arguments):
    file = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments, "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads(file.read_text())


def follows(row) -> bool:
    """Return whether the requirement is met, judged only by the numbers of the row."""
    if row["ratio"] is not None:
        assert math.isclose(row["ratio"], row["ours"] / max(row["peers"].values()))
        return row["ratio"] >= row["required"]
    if row["unit"].endswith(SPEEDS):
        assert not row["peers"]
        return False
    return row["ours"] >= row["required"] if row["unit"] == SHARE else row["ours"] <= row["required"]


@pytest.mark.parametrize(
    ("command", "works"),
    [
        (["prepare", "--samples", "60", "--documents", "8", "--rounds", "1"], 3),
        (["decode", "--rounds", "1"], 8),
        (["load", "--samples", "30", "--rounds", "1"], 2),
        (["pack", "--samples", "400"], 8),
        (["plan", "--images", "40000"], 14),
        (["open", "--documents", "2000", "--reads", "200", "--rounds", "1"], 3),
        (["train_step", "--rows", "1", "--rounds", "1", "--tower", "frozen", "--peers", "plain"], 1),
        pytest.param(["train_step", "--rows", "1", "--rounds", "1"], 10, marks=pytest.mark.slow),
        pytest.param(["convert", "--tiny"], 7, marks=pytest.mark.slow),
        pytest.param(
            ["checkpoint", "--hidden-size", "64", "--layers", "2", "--rounds", "1"], 3, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_benchmark_writes_what_follows_from_its_numbers(command, works, tmp_path):
    done, rows = run(tmp_path, *command)
    assert len(rows) == works
    assert len({(row["work"], *row["peers"]) for row in rows}) == works
    for row in rows:
        assert row.keys() == FIELDS
        assert all(isinstance(row[name], str) and row[name] for name in ("work", "unit"))
        assert not any(character.isdigit() for character in row["unit"].replace("of 255", ""))
        assert type(row["ours"]) in (int, float)
        assert type(row["required"]) in (int, float)
        assert row["ours"] >= 0
        assert all(type(value) in (int, float) and value >= 0 for value in row["peers"].values())
        assert row["met"] is follows(row)
    assert done.returncode == (0 if all(row["met"] for row in rows) else 1)


def test_opening_a_million_documents_takes_less_than_a_megabyte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    write_indexes = runpy.run_path(str(BENCHMARKS / "index_files.py"))["write_indexes"]
    images = np.random.default_rng(0).integers(1, 7, 1_000_000)
    write_indexes(tmp_path / "mmc4", images, 100 * images)
    # In a process of its own: a page that an earlier test touched would not be new.
    script = (
        "import psutil, sys\n"
        "from megatron_vlm.data.shards.dataset import ShardedDataset\n"
        "private = lambda: psutil.Process().memory_full_info().uss\n"
        "before = private()\n"
        "dataset = ShardedDataset.open(sys.argv[1])\n"
        "print(private() - before, len(dataset))\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "mmc4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    grown, number = map(int, done.stdout.split())
    assert number == 1_000_000
    assert grown < 1e6


class _FixedWorker:
    def __init__(self, loss, norm):
        self.results = loss, norm, 1.0

    def step(self):
        return self.results


@pytest.mark.parametrize(
    ("theirs", "what"), [((2.0001, 1.0), "loss of plain at step 1"), ((2.0, 1.001), "gradient norm")]
)
def test_a_peer_that_computes_something_else_ends_the_comparison(theirs, what, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    steps = runpy.run_path(str(BENCHMARKS / "train_step.py"))["_steps"]
    workers = {"ours": _FixedWorker(2.0, 1.0), "plain": _FixedWorker(*theirs)}
    with pytest.raises(ValueError, match=what):
        list(steps(workers, 0))
    workers["plain"] = _FixedWorker(2.00001, 1.00005)
    assert list(steps(workers, 0)) == [("ours", 1.0), ("plain", 1.0)]


def test_models_of_the_benchmark_are_converted_in_and_out(tmp_path, monkeypatch):
    """The steps of the slow test, in this process, which has imported everything."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = runpy.run_path(str(BENCHMARKS / "convert.py"))
    taken, verbs = benchmark["Taken"](seconds=2.0, cpu_seconds=1.0, gibibytes=0.5), []

    def run(python, script, *arguments):
        if script == "-m":
            verbs.append(arguments[2])
            assert main(list(map(str, arguments[1:]))) == 0
        elif arguments[0] == "--write":
            part, settings, folder = arguments[1:]
            folder.parent.mkdir(exist_ok=True)
            benchmark[f"write_{part}"](folder, json.loads(settings))
        else:
            benchmark["copy_and_hash"](*arguments[1:])
        return taken

    benchmark["measure"].__globals__["_run"] = run
    rows = benchmark["measure"](tmp_path, {**benchmark["_TINY"], "num_hidden_layers": 2}, benchmark["_TINY_TOWER"])
    assert verbs == ["from-hf", "to-hf", "verify"]
    assert [row.unit for row in rows] == 2 * ["MB a second", "MB per CPU second"] + 3 * ["GiB"]
    assert all(row.met for row in rows)
    assert all(row.ratio == 1 for row in rows[:4])


def test_state_that_grows_with_the_position_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = runpy.run_path(str(BENCHMARKS / "plan.py"))["measure"]
    progress = TrainState.progress
    monkeypatch.setattr(TrainState, "progress", lambda state: {**progress(state), "seen": [0] * state.consumed_samples})
    (tmp_path / "plan").mkdir()
    state, growth = measure(20000, 20000, tmp_path / "plan")[-2:]
    assert (state.met, growth.met) == (False, False)
    assert growth.ours > 20000


def test_rolling_subset_sum_fills_rows_as_far_as_it_can(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = runpy.run_path(str(BENCHMARKS / "pack.py"))
    lengths = [5, 3, 7, 2, 2]
    for room in range(1, 20):
        sums = {sum(chosen) for n in range(6) for chosen in itertools.combinations(lengths, n)}
        positions = benchmark["_fill"](lengths, room)
        assert positions == sorted(set(positions), reverse=True)
        assert sum(lengths[position] for position in positions) == max(value for value in sums if value <= room)
    assert benchmark["count_rows_subset_sum"](np.array([6, 5, 4, 5, 3, 7]), 10) == 3


def test_table_has_a_line_a_row_and_names_versions(tmp_path):
    done, rows = run(tmp_path, "pack", "--samples", "200")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["work", "ours", "peers", "unit", "ratio", "required"]
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.startswith(row["work"])
        assert line.endswith("  met" if row["met"] else "  NOT MET")
    assert [line for line in lines[1 + len(rows) :] if line.startswith("note: measured with numpy ")]


def test_missing_peer_is_told_and_its_row_is_not_met(tmp_path):
    script = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import report\n"
        "report.is_installed = lambda module: False\n"
        f"runpy.run_path({str(BENCHMARKS / 'prepare.py')!r}, run_name='__main__')\n"
    )
    file = tmp_path / "results.json"
    options = ["--samples", "20", "--documents", "2", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", script, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "note: megatron-energon is not installed" in done.stdout
    assert "pip install -r" in done.stdout
    (row,) = (row for row in json.loads(file.read_text()) if not row["peers"])
    assert (row["work"], row["ratio"], row["met"]) == ("prepare pairs, 20 samples", None, False)
    assert row["ours"] > 0
    assert row["required"] == 4.0
