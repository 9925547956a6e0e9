"""`megatron-vlm select {pairs,text}`: keep the best pairs before they are downloaded, or a part of a lot of text."""

import argparse

from megatron_vlm.cli.options import add_input, add_max_record_bytes, add_workers
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.cli.values import new_folder, number, seed
from megatron_vlm.config import ExitCode, UsageError

_PAIRS_EXAMPLE = """example (the paper's 25M of COYO-700M):
  megatron-vlm select pairs --input coyo-700m --output coyo-25m --top 25M \\
      --by clip_similarity_vitb32+clip_similarity_vitl14
"""
_PAIRS_NOTES = """
Then download, for example with img2dataset --input_format parquet --url_list coyo-25m --url_col url --caption_col text.
Of equal scores the row that comes first is kept: files by name within a folder, then rows.
--fraction 0.2 --min-score 0.6 is what VILA's published script does, file by file.
"""
_TEXT_EXAMPLE = """example (the paper's 1M of FLAN):
  megatron-vlm select text --input flan/*_data --output flan-1m --number 1M --seed 0
"""
_TEXT_NOTES = """
The records with the smallest hashes of their bytes and the seed are kept: the same ones for any order of files and any
number of workers. They are copied as they are, into one .jsonl for each input file that has any of them.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "select",
        help="keep the top pairs by CLIP similarity over all parquet files, or N records of text",
        epilog=f"{_PAIRS_EXAMPLE}\n{_TEXT_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_pairs(kinds)
    _add_text(kinds)
    parser.set_defaults(run=run)


def _add_pairs(kinds: argparse._SubParsersAction) -> None:
    pairs = kinds.add_parser(
        "pairs",
        help="rows of parquet files; exact, in memory that depends on --top alone",
        epilog=_PAIRS_EXAMPLE + _PAIRS_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input(pairs, "parquet files, folders of them, patterns, or URLs")
    add = pairs.add_argument
    add(
        "--output", type=new_folder, required=True, metavar="DIR", help="new folder: parquet, _report.json, _scores.png"
    )
    add("--by", required=True, metavar="COLUMN[+COLUMN]", help="the score: a column, or the sum of several")
    amount = pairs.add_mutually_exclusive_group(required=True)
    amount.add_argument("--top", metavar="N", help="rows to keep of all files together: 25M, 400K, 1000")
    amount.add_argument("--fraction", metavar="F", help="or the share of its rows that each file keeps, e.g. 0.2")
    add("--min-score", type=number(), metavar="X", help="keep only scores above this")


def _add_text(kinds: argparse._SubParsersAction) -> None:
    text = kinds.add_parser(
        "text",
        help="records of JSON or parquet; exact, in memory that depends on --number alone",
        epilog=_TEXT_EXAMPLE + _TEXT_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input(text, "JSON lines or arrays, also .gz or .zip, or parquet; files, folders of them, or URLs")
    add = text.add_argument
    add("--output", type=new_folder, required=True, metavar="DIR", help="new folder: .jsonl, _report/select.json")
    add("--number", required=True, metavar="N", help="records to keep of all files together: 1M, 400K, 1000")
    add("--seed", type=seed, default=0, metavar="S", help="another one keeps other records (default: %(default)s)")
    add_workers(text)
    add_max_record_bytes(text)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit code."""
    with stops_at_once(""):
        return _run_text(args) if args.kind == "text" else _run_pairs(args)


def _run_pairs(args: argparse.Namespace) -> int:
    from fractions import Fraction

    from megatron_vlm.data.files.inputs import find_files
    from megatron_vlm.data.select.pairs import SelectRules, parse_count, select_pairs

    try:
        top = parse_count(args.top) if args.top is not None else None
        fraction = Fraction(args.fraction) if args.fraction is not None else None
    except (ValueError, ZeroDivisionError):
        given = f"--top {args.top}" if args.top is not None else f"--fraction {args.fraction}"
        raise UsageError(f"{given} is not a number", fix="use --top 25M or --fraction 0.2") from None
    columns = tuple(name.strip() for name in args.by.split("+"))
    rules = SelectRules(columns=columns, top=top, fraction=fraction, min_score=args.min_score)
    report = select_pairs(find_files(tuple(args.input), (".parquet",), "parquet files"), args.output, rules)
    print(
        f"rows {report['rows']} = kept {report['kept']} + dropped {report['rows'] - report['kept']}"
        f"{_in_brackets(report['dropped'])}"
    )
    print(f"scores kept: {report['lowest_kept_score']:.6g} to {report['highest_score']:.6g}")
    print(f"wrote {args.output}")
    return ExitCode.DONE


def _run_text(args: argparse.Namespace) -> int:
    from megatron_vlm.data.files.inputs import find_instruction_files
    from megatron_vlm.data.select.pairs import parse_count
    from megatron_vlm.data.select.text import TextSelectRules, select_text

    try:
        number = parse_count(args.number)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--number {args.number} is not a whole number above 0", fix="use --number 1M") from None
    rules = TextSelectRules(number=number, seed=args.seed, max_record_bytes=args.max_record_bytes)
    report = select_text(find_instruction_files(tuple(args.input)), args.output, rules, num_workers=args.workers)
    print(
        f"records {report['records']} = kept {report['kept']} + not chosen {report['not_chosen']} "
        f"+ rejected {report['rejected']}{_in_brackets(report['rejects'])}"
    )
    print(f"wrote {args.output}")
    return ExitCode.DONE


def _in_brackets(reasons: dict[str, int]) -> str:
    from megatron_vlm.data.rejects import describe_rejects

    return f" ({describe_rejects(reasons)})" if any(reasons.values()) else ""
