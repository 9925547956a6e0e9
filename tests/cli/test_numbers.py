import argparse

import pytest

from megatron_vlm.cli.numbers import number, positive, seed, whole_number


def test_numbers_within_bounds_are_taken():
    assert (positive("1"), whole_number(0)("0"), whole_number(1, 95)("95")) == (1, 0, 95)
    assert (number()("-0.5"), number(1)("1e1")) == (-0.5, 10.0)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (positive, "0", "0 is below 1"),
        (whole_number(0), "-1", "-1 is below 0"),
        (whole_number(1, 95), "96", "96 is not from 1 to 95"),
        (seed, "-1", "-1 is not from 0 to 9223372036854775807"),
        (positive, "1.5", "'1.5' is not a whole number"),
        (number(), "nan", "'nan' is not a finite number"),
        (number(), "-inf", "'-inf' is not a finite number"),
        (number(), "wide", "'wide' is not a number"),
        (number(1), "0.5", "0.5 is below 1"),
    ],
)
def test_other_numbers_are_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)
