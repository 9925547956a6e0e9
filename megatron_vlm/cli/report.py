"""`megatron-vlm report RUN`: the curves, events and settings of a run as one HTML page."""

import argparse

from megatron_vlm.cli.values import local_path, new_file
from megatron_vlm.config import ExitCode

_EXAMPLE = """example:
  megatron-vlm report runs/pretrain --output pretrain.html

The page needs no other file and no network, so it can be sent around.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page about a run: losses, throughput, packing, events, configuration",
        description="Write one HTML page about a run; the run may still be going on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=local_path, metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--output", type=new_file, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from megatron_vlm.platform.files.durable import storage_errors, write_durably
    from megatron_vlm.training.report import render_report
    from megatron_vlm.training.run_records import read_run

    records = read_run(args.folder)
    output = args.output or args.folder / "report.html"
    with storage_errors("report cannot be written", output):
        write_durably(output, render_report(records).encode())
    print(f"wrote {output}")
    return ExitCode.DONE
