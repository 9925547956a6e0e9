"""What all reports are made of: the HTML page, its cards and tables, and how numbers look."""

import html
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LATEST = 100
"""Iterations that the latest means are taken over."""
_STYLE = Path(__file__).with_name("report.css")


def render_page(title: str, sections: Iterable[str]) -> str:
    """Return a page that needs nothing beside itself; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>\n{_STYLE.read_text()}</style></head>\n"
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


def card(title: str, content: str) -> str:
    """Return a section with a heading."""
    return f'<section class="card"><h2>{title}</h2>{content}</section>'


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; its cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def mean(values: Iterable[float]) -> float:
    """Return the mean of the finite values; nan if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def ratio(count: float, of: float) -> float:
    """Return the quotient; 0 of nothing."""
    return count / of if of else 0.0


def number(value: float) -> str:
    """Return four digits, "-" for nan."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def count(value: float) -> str:
    """Return a count with its unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def moment(unix_time: float) -> str:
    """Return a time of the clock, in UTC."""
    return datetime.fromtimestamp(unix_time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
