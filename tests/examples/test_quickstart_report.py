import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from quickstart.charts import Bar, BarChart, LineChart, Series, average_points, choose_ticks, draw_bars, draw_lines
from quickstart.curves import check_resume, measure_packing, measure_throughput, read_metrics
from quickstart.findings import Answer, Findings, check_requirements, summarise
from quickstart.report import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def make_record(iteration: int, loss: float = 0.5, source: str = "coyo") -> dict[str, Any]:
    return {
        "iteration": iteration,
        "loss": loss,
        "loss_hex": loss.hex(),
        "grad_norm_hex": (2.0 * loss).hex(),
        "tokens": 1500,
        "padding": 0.25,
        "seconds": 0.5,
        "tokens_per_s": 3000.0,
        f"loss/{source}": loss,
    }


def make_run(first: int, last: int, source: str = "coyo", seconds: float = 0.5) -> list[dict[str, Any]]:
    records = [make_record(iteration, 1.0 / iteration, source) for iteration in range(first, last + 1)]
    return [{**record, "seconds": seconds} for record in records]


def make_resumed() -> list[dict[str, Any]]:
    """A folder's records after a kill at 18 and a second start from 10, which ran a little slower."""
    return make_run(1, 10) + make_run(11, 40, seconds=0.6)


def make_findings(**changes: Any) -> Findings:
    values: dict[str, Any] = {
        "smoke": False,
        "stages": {"align": make_run(1, 20), "pretrain": make_resumed(), "sft": make_run(1, 30, "llava")},
        "straight": make_run(1, 25),
        "killed": make_run(1, 18),
        "resume": check_resume(make_run(1, 25), make_run(1, 18), make_resumed()),
        "kill": {"rank": 1, "exit_code": 1, "seconds_to_end": 2.5},
        "accuracy": 0.9,
        "num_questions": 10,
        "accuracy_by_kind": {"yes or no": (7, 8), "color": (1, 1), "shape": (1, 1)},
        "controls": {
            "most_frequent_answer": 0.37,
            "most_frequent_answer_per_question": 0.67,
            "other_picture": 0.61,
        },
        "answers": [Answer(picture=PNG, question="is it <b>red</b>?", expected="yes", predicted="no")],
        "logits": [{"num_images": 2, "num_tokens": 140, "max_difference": 2e-5}],
        "seconds": {"prepare": 3.0, "sft": 20.0},
        "facts": {"torch": "2.13.0"},
        "commands": [("sft", "megatron-vlm train sft.yaml --nproc-per-node 4")],
    }
    return Findings(**{**values, **changes})


class Page(HTMLParser):
    """Collects what a page refers to and whether its elements are closed."""

    VOID = ("meta", "img", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "link"

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_resumed_run_is_bit_equal_where_all_losses_agree() -> None:
    check = check_resume(make_run(1, 25), make_run(1, 18), make_resumed())
    assert check.bit_equal
    assert (check.killed_after, check.resumed_from) == (18, 10)
    assert check.compared == tuple(range(1, 26))


@pytest.mark.parametrize("part", ["killed", "resumed"])
def test_one_bit_of_difference_on_either_side_of_the_kill_is_found(part: str) -> None:
    runs = {"killed": make_run(1, 18), "resumed": make_resumed()}
    changed = next(record for record in runs[part] if record["iteration"] == 15)
    changed["grad_norm_hex"] = (2.0 / 15 * (1 + 2**-52)).hex()
    check = check_resume(make_run(1, 25), runs["killed"], runs["resumed"])
    assert not check.bit_equal
    assert check.different == (15,)


def test_comparison_that_ends_before_the_kill_proves_nothing() -> None:
    assert not check_resume(make_run(1, 18), make_run(1, 18), make_resumed()).bit_equal


def test_second_start_from_the_beginning_is_no_resume() -> None:
    check = check_resume(make_run(1, 25), make_run(1, 18), make_run(1, 40, seconds=0.6))
    assert not check.bit_equal
    assert check.resumed_from == 0


def test_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"itera')
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2]


def test_run_without_metrics_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_packing_is_tokens_over_positions() -> None:
    full = {**make_record(2), "tokens": 2000, "padding": 0.0}
    assert measure_packing([make_record(1), full]) == pytest.approx(3500 / 4000)


def test_throughput_is_tokens_over_seconds() -> None:
    assert measure_throughput([make_record(1), make_record(2)]) == 3000.0


def test_all_bars_are_met_by_good_findings() -> None:
    assert all(requirement.met for requirement in check_requirements(make_findings()))


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"accuracy": 0.79}, "accuracy on the test split"),
        (
            {
                "controls": {
                    "other_picture": 0.73,
                    "most_frequent_answer": 0.4,
                    "most_frequent_answer_per_question": 0.6,
                }
            },
            "accuracy when shown another test picture",
        ),
        ({"resume": check_resume([], [], [])}, "losses of the resumed run equal the uninterrupted run's"),
        ({"logits": []}, "logits of the exported model equal our own (transformers, fp32)"),
        (
            {"kill": {"rank": 1, "exit_code": 0, "seconds_to_end": 2.5}},
            "a killed rank ends the whole job with a non-zero exit code",
        ),
    ],
)
def test_each_missed_bar_is_named(changes: dict[str, Any], missed: str) -> None:
    findings = make_findings(**changes)
    assert [requirement.name for requirement in check_requirements(findings) if not requirement.met] == [missed]
    assert not summarise(findings)["passed"]


def test_smoke_run_is_not_held_against_accuracy() -> None:
    assert summarise(make_findings(smoke=True, accuracy=0.1))["passed"]


def test_summary_has_the_promised_keys() -> None:
    promised = {
        "test_accuracy",
        "controls",
        "resume_bit_equal",
        "max_logit_difference",
        "packing_utilisation",
        "seconds",
    }
    assert promised <= summarise(make_findings()).keys()


def test_report_is_well_formed_and_refers_to_nothing_beside_itself(tmp_path: Path) -> None:
    write_report(make_findings(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)


def test_report_shows_question_prediction_and_expected_answer_escaped(tmp_path: Path) -> None:
    write_report(make_findings(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "is it &lt;b&gt;red&lt;/b&gt;?" in text
    assert "not yes" in text


def test_report_names_missed_bars(tmp_path: Path) -> None:
    write_report(make_findings(accuracy=0.5), tmp_path / "report.html")
    assert "1 bar missed" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.37), (0, 9000), (3, 7), (-2, 2)])
def test_ticks_are_inside_and_evenly_spaced(low: float, high: float) -> None:
    ticks = choose_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert low <= ticks[0] <= ticks[-1] <= high
    steps = {round(right - left, 9) for left, right in zip(ticks, ticks[1:], strict=False)}
    assert len(steps) == 1


def test_points_are_averaged_to_at_most_the_asked_number() -> None:
    xs, ys = average_points(range(100), [float(value) for value in range(100)], 10)
    assert len(xs) == 10
    assert (xs[0], ys[-1]) == (4.5, 94.5)


def test_values_that_are_not_finite_are_left_out_of_lines() -> None:
    series = Series(name="a", xs=[1, 2, 3], ys=[1.0, float("nan"), 2.0], smooth=False)
    drawn = draw_lines(LineChart(title="t", series=[series], x_label="x", y_label="y"))
    assert "nan" not in drawn


def test_logarithmic_axis_gives_each_power_of_ten_the_same_height() -> None:
    series = Series(name="a", xs=[1, 2, 3], ys=[0.1, 1.0, 10.0], smooth=False)
    drawn = draw_lines(LineChart(title="t", series=[series], x_label="x", y_label="y", y_log=True))
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', drawn)[1].split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_chart_without_values_says_so() -> None:
    assert "no values" in draw_lines(LineChart(title="t", series=[], x_label="x", y_label="y"))


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar(name="half", value=0.5, text="50%"), Bar(name="full", value=1.0, text="100%")]
    widths = re.findall(r'class="bar c0"[^>]*width="([\d.]+)"', draw_bars(BarChart(title="t", bars=bars, limit=1.0)))
    assert float(widths[1]) == pytest.approx(2 * float(widths[0]))
