import pytest

from megatron_vlm.training.report_page import count, duration, mean, moment, number, ratio, render_page, table


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123456, "0.123 s"), (90, "90 s"), (600, "10 min"), (9000, "2.5 h"), (0, "0 s")]
)
def test_a_duration_has_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1500, "1.5 k"), (2.5e6, "2.5 M"), (3e9, "3 G"), (4e12, "4 T")]
)
def test_a_count_has_the_unit_that_fits(value, text):
    assert count(value) == text


def test_what_is_no_number_is_left_out():
    assert mean([1.0, float("nan"), float("inf"), 3.0]) == 2.0
    assert (number(mean([])), number(1.23456)) == ("-", "1.235")
    assert (ratio(1.0, 0.0), ratio(1.0, 4.0)) == (0.0, 0.25)


def test_times_are_in_utc():
    assert moment(1e9) == "2001-09-09 01:46:40"


def test_page_has_its_sections_and_a_safe_title():
    page = render_page("a < b", ["<p>one</p>", "", table(["x"], [[1], [2]])])
    assert "<title>a &lt; b</title>" in page
    assert "<p>one</p>\n<div" in page
    assert "<tr><th>x</th></tr><tr><td>1</td></tr><tr><td>2</td></tr>" in page
