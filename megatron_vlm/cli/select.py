"""`megatron-vlm select {pairs,text}`: keep the best pairs before downloading them, or a sample of a text corpus."""

import argparse

from megatron_vlm.cli.options import add_command, add_input, add_max_record_bytes, add_workers
from megatron_vlm.cli.stopping import stops_at_once
from megatron_vlm.cli.values import new_folder, number, seed
from megatron_vlm.config import ExitCode, UsageError

_PAIRS_EXAMPLE = r"""select pairs --input coyo-700m --output coyo-25m-list --top 25M \
      --by clip_similarity_vitb32+clip_similarity_vitl14"""
_PAIRS_NOTES = """The example selects the paper's 25M pairs of COYO-700M. Download them afterwards, for instance with
img2dataset --input_format parquet --url_list coyo-25m-list --url_col url --caption_col text.
Ties are broken by position: the first row wins, in the order of file names, then rows.
--fraction 0.2 --min-score 0.6 does what VILA's published script does, file by file.
"""
_TEXT_EXAMPLE = "select text --input flan/*_data --output flan-1m --number 1M --seed 0"
_TEXT_NOTES = """The example selects the paper's 1M records of FLAN. The records kept are those with the smallest
hashes of their bytes and the seed, so the choice does not depend on the order of the files or the number of workers.
Records are copied unchanged, into one .jsonl file for each input file that has any of them.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    text = "keep the image-text pairs with the highest scores, or a random sample of text records"
    parser = add_command(subparsers, "select", text, _PAIRS_EXAMPLE, _TEXT_EXAMPLE)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_pairs(kinds)
    _add_text(kinds)
    parser.set_defaults(run=run)


def _add_pairs(kinds: argparse._SubParsersAction) -> None:
    text = "rows of parquet files with the highest scores; exact, in memory that depends only on --top"
    pairs = add_command(kinds, "pairs", text, _PAIRS_EXAMPLE, notes=_PAIRS_NOTES)
    add_input(pairs, "parquet files, folders, patterns, or URLs")
    add = pairs.add_argument
    text = "new folder for the parquet files, _report.json and _scores.png"
    add("--output", type=new_folder, required=True, metavar="DIR", help=text)
    add("--by", required=True, metavar="COLUMN[+COLUMN]", help="score: one column, or the sum of several")
    amount = pairs.add_mutually_exclusive_group(required=True)
    amount.add_argument("--top", metavar="N", help="rows to keep over all files together: 25M, 400K, 1000")
    amount.add_argument("--fraction", metavar="F", help="fraction of rows to keep from each file, e.g. 0.2")
    add("--min-score", type=number(), metavar="X", help="keep only rows with a score above this")


def _add_text(kinds: argparse._SubParsersAction) -> None:
    text = "a random sample of JSON or parquet records; exact, in memory that depends only on --number"
    parser = add_command(kinds, "text", text, _TEXT_EXAMPLE, notes=_TEXT_NOTES)
    add_input(parser, "JSON lines or arrays, also .gz or .zip, or parquet; files, folders, or URLs")
    add = parser.add_argument
    text = "new folder for the .jsonl files and _report/select.json"
    add("--output", type=new_folder, required=True, metavar="DIR", help=text)
    add("--number", required=True, metavar="N", help="records to keep over all files together: 1M, 400K, 1000")
    add("--seed", type=seed, default=0, metavar="S", help="another seed keeps other records (default: %(default)s)")
    add_workers(parser)
    add_max_record_bytes(parser)


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
        raise UsageError(f"{given} is not a positive number", fix="use --top 25M or --fraction 0.2") from None
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
