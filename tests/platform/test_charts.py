import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.platform.charts import Line, Mark, average_points, draw_bars, draw_lines, save_png, to_svg


def test_same_values_give_the_same_svg():
    one, other = (to_svg(draw_lines("loss", [Line(name="a", xs=[1, 2], ys=[3.0, 2.0])], unit="nats")) for _ in range(2))
    assert one == other
    assert "<dc:date>" not in one


def test_svg_is_one_element_whose_groups_have_no_names_that_repeat_on_a_page():
    text = to_svg(draw_bars("samples", ["0", "1"], {"samples": [2, 1]}))
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert text.startswith("<svg")
    assert '<g id="' not in text


def test_words_are_text_of_the_svg():
    text = to_svg(draw_bars("samples by images", ["none", "one"], {"kept": [2, 1], "dropped": [1, 1]}, note="images"))
    assert all(f">{word}<" in text for word in ("samples by images", "none", "one", "kept", "dropped", "images"))


def test_dollar_signs_in_a_name_are_text():
    lines = [Line(name=name, xs=[1], ys=[1.0]) for name in ("a$^2$", "b$")]
    text = to_svg(draw_lines("$", lines, unit="$"))
    assert ">a$^2$<" in text


def test_name_of_a_single_line_is_told_where_asked_for():
    lines = [Line(name="coyo", xs=[1], ys=[1.0])]
    assert ">coyo<" not in to_svg(draw_lines("t", lines, unit=""))
    assert ">coyo<" in to_svg(draw_lines("t", lines, unit="", legend=True))


def test_thirty_lines_all_have_their_names():
    text = to_svg(draw_lines("t", [Line(name=f"data{n}", xs=[1, 2], ys=[n, n + 1]) for n in range(30)], unit=""))
    assert all(f">data{number}<" in text for number in range(30))


def test_bars_of_a_layer_stand_on_the_layer_below(tmp_path):
    save_png(draw_bars("", ["a"], {"kept": [1], "dropped": [3]}), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    middle = pixels[:, pixels.shape[1] // 2]
    blue, grey = (np.flatnonzero((middle == color).all(-1)) for color in ((52, 101, 164), (190, 190, 190)))
    assert blue.min() > grey.max()
    assert len(grey) == pytest.approx(3 * len(blue), rel=0.1)


def test_many_labels_are_thinned():
    text = to_svg(draw_bars("t", [f"label{number}" for number in range(100)], {"n": [1] * 100}))
    assert 6 <= text.count(">label") <= 12


def test_long_series_becomes_the_mean_of_neighbours():
    xs, ys = average_points(range(1000), [float(x) for x in range(1000)], count=10)
    assert (len(xs), xs[0], ys[0]) == (10, 49.5, 49.5)


def test_values_that_no_axis_can_hold_are_left_out():
    values = [1.0, math.nan, 0.0, math.inf, 2.0]
    assert average_points(range(5), values) == ([0.0, 2.0, 4.0], [1.0, 0.0, 2.0])
    assert average_points(range(5), values, positive=True) == ([0.0, 4.0], [1.0, 2.0])
    assert "<svg" in to_svg(draw_lines("t", [Line(name="a", xs=range(5), ys=values)], unit="", log=True))


def test_chart_without_values_is_drawn():
    assert "<svg" in to_svg(draw_bars("t", [], {"n": []}))
    assert "<svg" in to_svg(draw_lines("t", [], unit="", log=True))


def test_module_is_imported_without_matplotlib():
    script = "import sys, megatron_vlm.platform.charts; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("is_tick", [False, True])
def test_marks_are_drawn_and_named_once_where_there_is_a_legend(is_tick):
    lines = [Line(name="a", xs=[1, 9], ys=[3.0, 2.0])]
    mark = Mark(name="save", xs=[2, 4, 6], color="#123456", is_tick=is_tick)
    with_legend, without = (to_svg(draw_lines("t", lines, unit="", marks=[mark], legend=one)) for one in (True, False))
    assert with_legend.count(">save</text>") == 1
    assert ">save</text>" not in without
    assert without.count("#123456") >= 3
    assert "#123456" not in to_svg(draw_lines("t", lines, unit=""))
