"""Options that several verbs share."""

import argparse

from megatron_vlm.cli.values import location, positive
from megatron_vlm.platform.cores import count_cores


def add_input(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --input, whose help is `text`."""
    parser.add_argument("--input", type=location, nargs="+", required=True, metavar="PATH", help=text)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers; the default counts only cores that SLURM lets this process use."""
    text = "processes (default: one per core)"
    parser.add_argument("--workers", type=positive, default=count_cores(), metavar="N", help=text)


def add_max_record_bytes(parser: argparse._ActionsContainer) -> None:
    """Add --max-record-bytes."""
    text = "longest JSON record (default: 16 MiB)"
    parser.add_argument("--max-record-bytes", type=positive, default=16 << 20, metavar="N", help=text)
