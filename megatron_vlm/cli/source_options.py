"""Options of the verbs that read raw corpora: what is read, and by how many processes."""

import argparse

from megatron_vlm.cli.numbers import positive
from megatron_vlm.cli.paths import location
from megatron_vlm.platform.cores import count_cores


def add_input(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --input, whose help is `text`."""
    parser.add_argument("--input", type=location, nargs="+", required=True, metavar="PATH", help=text)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers; by default as many as there are cores for this process, which SLURM may have bound to a few."""
    text = "processes (default: one a core)"
    parser.add_argument("--workers", type=positive, default=count_cores(), metavar="N", help=text)


def add_max_record_bytes(parser: argparse._ActionsContainer) -> None:
    """Add --max-record-bytes."""
    text = "longest JSON record (default: 16 MiB)"
    parser.add_argument("--max-record-bytes", type=positive, default=16 << 20, metavar="N", help=text)
