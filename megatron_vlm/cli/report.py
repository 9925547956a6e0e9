"""`megatron-vlm report RUN [RUN_B]`: a run, or two runs beside each other, as one HTML page."""

import argparse

from megatron_vlm.cli.values import local_path, new_file
from megatron_vlm.config import ExitCode

_EXAMPLE = """example:
  megatron-vlm report runs/pretrain --output pretrain.html
  megatron-vlm report runs/pretrain runs/pretrain_lr2e-4 --output both.html

The page needs no other file and no network, so it can be sent around.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page about a run, or about two: losses, throughput, goodput, events, configuration",
        description="Write one HTML page about a run, or compare two; the runs may still be going on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=local_path, metavar="RUN", help="run folder, finished or not")
    parser.add_argument(
        "other", nargs="?", type=local_path, metavar="RUN_B", help="a second run, to compare with the first"
    )
    parser.add_argument(
        "--output", type=new_file, metavar="FILE", help="the page (default: RUN/report.html, or RUN_B/comparison.html)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from megatron_vlm.platform.files.durable import storage_errors, write_durably
    from megatron_vlm.training.report import render_report
    from megatron_vlm.training.report_comparison import render_comparison
    from megatron_vlm.training.run_records import read_run

    first = read_run(args.folder)
    if args.other is None:
        output, page = args.output or args.folder / "report.html", render_report(first)
    else:
        output, page = args.output or args.other / "comparison.html", render_comparison(first, read_run(args.other))
    with storage_errors("report cannot be written", output):
        write_durably(output, page.encode())
    print(f"wrote {output}")
    return ExitCode.DONE
