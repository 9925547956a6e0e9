"""`megatron-vlm select pairs`: keep the best pairs before their images are downloaded."""

import argparse
from pathlib import Path

from megatron_vlm.config import ExitCode, UsageError

_EXAMPLES = """example (the paper's 25M of COYO-700M):
  megatron-vlm select pairs --input coyo-700m --output coyo-25m --top 25M \\
      --by clip_similarity_vitb32+clip_similarity_vitl14

Then download, for example with img2dataset --input_format parquet --url_list coyo-25m --url_col url --caption_col text.
Of equal scores the row that comes first is kept: files by name within a folder, then rows.
--fraction 0.2 --min-score 0.6 is what VILA's published script does, file by file.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "select",
        help="keep the top pairs by CLIP similarity over all parquet files",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    pairs = kinds.add_parser(
        "pairs",
        help="rows of parquet files; exact, in memory that depends on --top alone",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = pairs.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="parquet files, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder: parquet, _report.json, _scores.png")
    add("--by", required=True, metavar="COLUMN[+COLUMN]", help="the score: a column, or the sum of several")
    amount = pairs.add_mutually_exclusive_group(required=True)
    amount.add_argument("--top", metavar="N", help="rows to keep of all files together: 25M, 400K, 1000")
    amount.add_argument("--fraction", metavar="F", help="or the share of its rows that each file keeps, e.g. 0.2")
    add("--min-score", type=float, metavar="X", help="keep only scores above this")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    from fractions import Fraction

    from megatron_vlm.data.select import SelectRules, parse_count, select_pairs
    from megatron_vlm.data.sources.source import find_files

    try:
        top = parse_count(args.top) if args.top is not None else None
        fraction = Fraction(args.fraction) if args.fraction is not None else None
    except (ValueError, ZeroDivisionError):
        given = f"--top {args.top}" if args.top is not None else f"--fraction {args.fraction}"
        raise UsageError(f"{given} is not a number", fix="use --top 25M or --fraction 0.2") from None
    columns = tuple(name.strip() for name in args.by.split("+"))
    rules = SelectRules(columns=columns, top=top, fraction=fraction, min_score=args.min_score)
    report = select_pairs(find_files(tuple(args.input), (".parquet",), "parquet files"), args.output, rules)
    reasons = ", ".join(f"{reason} {count}" for reason, count in report["dropped"].items())
    print(f"rows {report['rows']} = kept {report['kept']} + dropped {report['rows'] - report['kept']} ({reasons})")
    print(f"scores kept: {report['lowest_kept_score']:.6g} to {report['highest_score']:.6g}")
    print(f"wrote {args.output}")
    return ExitCode.DONE
