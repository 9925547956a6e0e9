import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.select.histogram import ScoreHistogram, histogram_rows, save_histogram


def filled(scores, *, pieces=1, width=None) -> ScoreHistogram:
    histogram = ScoreHistogram() if width is None else ScoreHistogram(width)
    for piece in np.array_split(scores, pieces):
        histogram.add(piece)
    return histogram


@pytest.mark.parametrize("scale", [1e-6, 0.3, 50.0, 1e300])
def test_every_score_is_counted_in_at_most_128_bins_whatever_the_range_and_order(scale):
    scores = np.random.default_rng(0).normal(size=3000) * scale
    one, other = filled(scores), filled(scores[::-1], pieces=7)
    assert (one.width, one.bins) == (other.width, other.bins)
    assert one.bins.total() == 3000
    assert max(one.bins) - min(one.bins) < 128


def test_bins_hold_the_scores_between_their_borders():
    scores = np.array([-0.3, 0.0, 0.4999, 0.5, 1.0])
    histogram = filled(scores, width=0.5)
    assert dict(histogram.bins) == {-1: 1, 0: 2, 1: 1, 2: 1}


def test_rows_tell_kept_and_dropped_apart():
    everything = filled(np.array([0.1, 0.1, 0.9]), width=0.5)
    assert histogram_rows(everything, filled(np.array([0.9, 0.1]), width=0.5)) == [
        {"from": 0.0, "kept": 1, "dropped": 1},
        {"from": 0.5, "kept": 1, "dropped": 0},
    ]


def test_bins_of_two_widths_are_refused():
    with pytest.raises(ValueError, match=r"bins are 0\.5 and 1\.0 wide"):
        histogram_rows(filled(np.zeros(1), width=0.5), filled(np.zeros(1), width=1.0))


def test_picture_has_blue_for_kept_and_grey_for_dropped(tmp_path):
    everything = filled(np.repeat([0.0, 2.0], [3, 5]), width=0.5)
    rows = histogram_rows(everything, filled(np.repeat(2.0, 5), width=0.5))
    save_histogram("x", rows, 0.5, tmp_path / "scores.png")
    with Image.open(tmp_path / "scores.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    blue, grey = ((pixels == color).all(-1) for color in ((52, 101, 164), (190, 190, 190)))
    bottom = pixels.shape[0] * 3 // 4
    kept, dropped = (np.flatnonzero(color[bottom]) for color in (blue, grey))
    # The bins between the two hold nothing, and their room stays free.
    assert kept.min() - dropped.max() > len(kept)
    assert blue[:, kept[1]].sum() / grey[:, dropped[1]].sum() == pytest.approx(5 / 3, rel=0.1)
