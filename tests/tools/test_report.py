"""How the benchmarks judge a figure."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("benchmark_report", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def make_row(report):
    def make(**options):
        return report.Row(**({"work": "w", "unit": "things per CPU second", "ours": 6.0, "required": 2.0} | options))

    return make


@pytest.mark.parametrize(("peers", "ratio", "met"), [({"a": 2.0}, 3.0, True), ({"a": 2.0, "b": 4.0}, 1.5, False)])
def test_ratio_is_to_the_best_peer(make_row, peers, ratio, met):
    row = make_row(peers=peers)
    assert (row.ratio, row.met) == (ratio, met)


def test_ratio_without_a_peer_is_not_met(make_row):
    assert (make_row().ratio, make_row().met) == (None, False)


@pytest.mark.parametrize(("judged", "required", "met"), [("at least", 7, False), ("at most", 7, True)])
def test_bound_decides_whatever_the_peers_do(make_row, judged, required, met):
    row = make_row(judged=judged, required=required, peers={"a": 1.0})
    assert (row.ratio, row.met) == (None, met)


def test_exit_code_is_one_if_a_row_is_not_met(report, make_row, capsys):
    assert report.report([make_row(peers={"a": 1.0})], None) == 0
    assert report.report([make_row(peers={"a": 1.0}), make_row()], None, ["n"]) == 1
    assert "none installed" in capsys.readouterr().out


def test_cpu_seconds_count_those_of_children_and_not_the_first_turn(report):
    import subprocess

    turns = []

    def burn():
        turns.append(1)
        subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True)

    seconds = report.cpu_seconds(2, {"child": burn, "nothing": lambda: None})
    assert len(turns) == 3
    assert seconds["child"] > seconds["nothing"]
    assert seconds["child"] > 0.005
