"""Numbers on the command line: what is out of range is a wrong command line, told before anything starts."""

import argparse
import math
from collections.abc import Callable


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type for argparse: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            bounds = f"below {least}" if most is None else f"not from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value} is {bounds}")
        return value

    return read


def number(least: float = -math.inf) -> Callable[[str], float]:
    """Return a type for argparse: a finite number of at least `least`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least:g}")
        return value

    return read


positive = whole_number(1)
"""A type for argparse: a whole number of at least 1."""

seed = whole_number(0, 2**63 - 1)
"""A type for argparse: what every generator of random numbers takes as its seed."""
