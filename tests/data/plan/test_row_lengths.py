"""Advice on the row length."""

import dataclasses

import numpy as np
import pytest

from megatron_vlm.config import BlendEntry
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.row_lengths import RowLength, choose_row_length, compare_row_lengths
from megatron_vlm.data.plan.settings import PlanSettings

SETTINGS = PlanSettings(
    blend=(BlendEntry(path="pairs"),),
    seq_length=4096,
    image_tokens=ImageTokens(576),
    packing=True,
    overflow="truncate",
    seed=1,
    global_batch_size=8,
    train_iters=None,
    train_epochs=1.0,
)


class Lengths:
    fingerprint = "pairs"

    def __init__(self, num_images, text_lengths) -> None:
        self.num_images = np.array(num_images, dtype=np.int32)
        self.text_lengths = np.array(text_lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.num_images)

    def outlines(self, samples):
        raise AssertionError("advice needs lengths only")


def make_pairs(number: int = 10_000) -> Lengths:
    text = np.exp(np.random.default_rng(0).normal(np.log(22.7) - 0.18, 0.6, number))
    return Lengths(np.ones(number), 2 + np.maximum(np.rint(text), 1))


def test_seven_images_and_their_text_want_4224_instead_of_4096():
    candidates = compare_row_lengths(SETTINGS, [make_pairs()])
    found = {candidate.seq_length: candidate.utilisation for candidate in candidates}
    assert found[4096] < 0.9
    assert found[4224] > 0.99
    assert choose_row_length(candidates, 4096).seq_length == 4224


def test_shorter_rows_that_cut_more_samples_are_not_advised():
    candidates = [RowLength(90, 0.99, 0.2), RowLength(100, 0.9, 0.1), RowLength(110, 0.95, 0.1)]
    assert choose_row_length(candidates, 100).seq_length == 110


def test_samples_that_are_dropped_do_not_count():
    dataset = Lengths([0] * 20, [100] * 10 + [5000] * 10)
    dropped = compare_row_lengths(dataclasses.replace(SETTINGS, overflow="drop"), [dataset])
    cut = compare_row_lengths(SETTINGS, [dataset])
    assert [candidate.too_long for candidate in dropped] == [0.5] * len(dropped)
    assert dropped[2].utilisation == pytest.approx(10 * 100 / 4096)
    assert cut[2].utilisation == pytest.approx((10 * 100 + 10 * 4096) / (11 * 4096))


def test_blend_decides_how_much_of_each_dataset_is_packed():
    blend = (BlendEntry(path="a", epochs=2), BlendEntry(path="b", epochs=0.5))
    datasets = [Lengths([0] * 10, [4096] * 10), Lengths([0] * 10, [8000] * 10)]
    candidates = compare_row_lengths(dataclasses.replace(SETTINGS, blend=blend), datasets)
    assert candidates[2].too_long == pytest.approx(5 / 25)
