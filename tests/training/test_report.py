import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vlm.platform.launch.exit_status import ExitStatus, write_exit_status
from megatron_vlm.training import report
from megatron_vlm.training.report import render_report
from megatron_vlm.training.run_records import read_run
from megatron_vlm.training.validation import VALIDATION_LOSS

VOID = {"meta", "path", "use", "rect", "line", "br"}


class Page(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def record(iteration: int, **values) -> dict:
    return {
        "iteration": iteration,
        "stage": "pretrain",
        "loss": 8.0 / iteration,
        "grad_norm": 2.0,
        "learning_rate": 1e-3,
        "tokens": 1500,
        "labels": 300,
        "images": 10,
        "padding": 0.25,
        "seconds": 0.5,
        "tokens_per_s": 3000.0,
        "data_wait": 0.05,
        "tflops_per_rank": 0.5,
        "mfu": None,
        "loss/mmc4": 9.0 / iteration,
        "loss/coyo": 7.0 / iteration,
        **values,
    }


def write_run(run_dir: Path, records: list[dict]) -> Path:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return run_dir


def page_of(run_dir: Path) -> str:
    return render_report(read_run(run_dir))


def titles(page: str) -> list[str]:
    known = [
        "Loss by dataset",
        "Validation loss",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "Padding",
        "Data wait",
    ]
    return [title for title in [*known, "MFU", "Compute"] if f">{title}</text>" in page]


def test_page_needs_nothing_beside_itself(tmp_path):
    page = page_of(write_run(tmp_path, [record(number) for number in range(1, 30)]))
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.addresses
    assert all(address.startswith("#") for address in parsed.addresses)


def test_same_run_gives_the_same_page(tmp_path):
    write_run(tmp_path, [record(number) for number in range(1, 30)])
    assert page_of(tmp_path) == page_of(tmp_path)


def test_page_has_a_chart_of_each_quantity_and_a_line_of_each_dataset(tmp_path):
    page = page_of(write_run(tmp_path, [record(number) for number in range(1, 30)]))
    expected = ["Loss by dataset", "Gradient norm", "Learning rate", "Throughput", "Padding", "Data wait", "Compute"]
    assert titles(page) == expected
    assert page.count(">mmc4</text>") == page.count(">coyo</text>") == 1


def test_validation_and_mfu_are_shown_where_they_are_known(tmp_path):
    values = {"validation_loss": 2.0, "validation_loss/mmc4": 2.5, "validation_loss/coyo": 1.5, "mfu": 0.4}
    page = page_of(write_run(tmp_path, [record(1), record(2, **values)]))
    assert "Validation loss" in titles(page)
    assert ("MFU" in titles(page), "Compute" in titles(page)) == (True, False)
    assert "<td>mmc4</td><td>9</td><td>6.75</td><td>2.5</td><td>-</td><td>-</td><td>-</td>" in page
    assert "40.0%" in page


def test_validation_is_looked_for_under_the_key_that_runs_write():
    assert report._VALIDATION == VALIDATION_LOSS


def test_dataset_that_is_only_validated_on_has_a_row(tmp_path):
    page = page_of(write_run(tmp_path, [record(1), record(2, **{"validation_loss/llava": 3.0})]))
    assert "<td>llava</td><td>-</td><td>-</td><td>3</td><td>-</td><td>-</td><td>-</td>" in page


def test_figures_are_those_of_the_whole_run(tmp_path):
    records = [
        record(1),
        record(2, tokens=500, padding=0.75, seconds=1.5, data_wait=0.15, flops=4e9),
        record(3, tokens=0),
    ]
    page = page_of(write_run(tmp_path, records))
    assert "<b>800</b>" in page  # 2000 tokens in 2.5 s
    assert "<b>50.0%</b>" in page  # of 4000 positions
    assert "<b>10.0%</b>" in page  # 0.25 of 2.5 s
    assert "<td>total</td><td>4.000e+09</td>" in page
    assert "<td>per rank</td><td>1.250e+12</td>" in page


def test_what_was_seen_of_each_dataset_is_shown(tmp_path):
    seen = {"seen_tokens/mmc4": 3000, "seen_tokens/coyo": 1000, "passes/mmc4": 1.5, "passes/coyo": 0.25}
    page = page_of(write_run(tmp_path, [record(1), record(2, **seen)]))
    assert "<td>3 k</td><td>75.0%</td><td>1.5</td>" in page
    assert "<td>1 k</td><td>25.0%</td><td>0.25</td>" in page


def test_run_without_an_iteration_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("stage: align\nname: <a>\n")
    write_exit_status(tmp_path / "exit_status.json", ExitStatus(exit_code=78, message="a < b"))
    page = page_of(tmp_path)
    assert Page(page).open == []
    assert all(
        text in page for text in ("No iteration has finished yet", "exit code 78", "a &lt; b", "name: &lt;a&gt;")
    )
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("status", "text"), [(None, "running, or killed"), (ExitStatus(exit_code=0, message=""), ">finished<")]
)
def test_head_says_how_the_run_ended(tmp_path, status, text):
    write_run(tmp_path, [record(1)])
    if status is not None:
        write_exit_status(tmp_path / "exit_status.json", status)
    assert text in page_of(tmp_path)


def test_planned_iterations_and_left_out_lines_are_told(tmp_path):
    write_run(tmp_path, [record(1), record(2)])
    (tmp_path / "metrics.jsonl").open("a").write('{"iteration": 3')
    (tmp_path / "config.yaml").write_text("training: {train_iters: 4000}\n")
    page = page_of(tmp_path)
    assert "of 4,000 planned" in page
    assert "1 unreadable lines of metrics.jsonl and events.jsonl are ignored" in page


def test_record_of_an_earlier_version_with_few_keys_has_a_page(tmp_path):
    page = page_of(write_run(tmp_path, [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "loss": float("nan")}]))
    assert titles(page) == ["Loss by dataset"]
    assert Page(page).open == []


def test_settings_of_another_shape_have_a_page(tmp_path):
    write_run(tmp_path, [record(1)])
    (tmp_path / "config.yaml").write_text("training: 5\n")
    assert "of 5 planned" not in (page := page_of(tmp_path))
    assert Page(page).open == []
