"""Two runs beside each other, figures computed by hand."""

import json

import pytest

from megatron_vlm.training.report_comparison import render_comparison
from megatron_vlm.training.run_records import read_run


def write_run(run_dir, losses, *, seconds=0.5, config="optimizer: {lr: 0.001}", **values):
    run_dir.mkdir(parents=True)
    records = [
        {"iteration": n, "loss": loss, "tokens": 100, "seconds": seconds, "grad_norm": 1.0, **values}
        for n, loss in enumerate(losses, start=1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (run_dir / "config.yaml").write_text(config)
    return run_dir


def page_of(one, other):
    return render_comparison(read_run(one), read_run(other))


@pytest.fixture
def page(tmp_path):
    one = write_run(tmp_path / "a", [4.0, 2.0], mfu=0.2, config="optimizer: {lr: 0.001}\ndata: {blend: [{path: x}]}")
    other = write_run(
        tmp_path / "b",
        [4.0, 1.0, 0.4],
        seconds=0.25,
        config="optimizer: {lr: 0.002, clip: <b>}\ndata: {blend: [{path: x}]}",
    )
    return page_of(one, other)


def test_figures_stand_beside_each_other_with_their_ratio(page):
    assert "<td>iterations</td><td>2</td><td>3</td><td>1.5</td>" in page
    assert "iterations until 2</td><td>3</td><td>2.5</td><td>0.8333</td>" in page
    assert "its last 100</td><td>3</td><td>1.8</td><td>0.6</td>" in page
    assert "<td>tokens/s, without padding</td><td>200</td><td>400</td><td>2</td>" in page
    assert "<td>MFU</td><td>20.0%</td><td>-</td><td>-</td>" in page
    assert "validation loss</td>" not in page  # neither has one


def test_only_settings_that_differ_are_shown(page):
    assert "<code>optimizer.lr</code></td><td>0.001</td><td>0.002</td>" in page
    assert "<code>optimizer.clip</code></td><td>-</td><td>&lt;b&gt;</td>" in page
    assert "data.blend" not in page


def test_curves_are_drawn_over_each_other(page):
    for title in ("Loss", "Loss over tokens", "Gradient norm", "MFU"):
        assert f">{title}</text>" in page
    assert "tokens, without padding" in page
    assert page.count(">a</text>") == 4
    assert page.count(">b</text>") == 3


def test_equal_settings_are_told(tmp_path):
    page = page_of(write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [1.0]))
    assert "The settings are the same" in page


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    page = page_of(write_run(tmp_path / "x" / "sft", [1.0]), write_run(tmp_path / "y" / "sft", [1.0]))
    assert "<h1>x/sft and y/sft</h1>" in page
    same = page_of(tmp_path / "x" / "sft", tmp_path / "x" / "sft")
    assert "sft (1) and" in same


def test_a_run_without_an_iteration_has_no_curve(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("stage: sft\n")
    page = page_of(write_run(tmp_path / "a", [2.0]), tmp_path / "new")
    assert "<td>iterations</td><td>1</td><td>0</td><td>0</td>" in page
    assert page.count("<svg") == 3
