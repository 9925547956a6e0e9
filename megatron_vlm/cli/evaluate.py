"""`megatron-vlm evaluate`: answer the questions of a benchmark and score the answers."""

import argparse
import json
from pathlib import Path

from megatron_vlm.cli.inference_options import add_model_options, opened_model
from megatron_vlm.cli.numbers import positive, seed, whole_number
from megatron_vlm.cli.paths import local_path, new_file
from megatron_vlm.config import ExitCode, UsageError
from megatron_vlm.platform.files.durable import write_durably

_EXAMPLE = r"""example:
  megatron-vlm evaluate runs/sft --task vqa --questions vqa.json --images pictures --output answers.json \
      --suffix "\nAnswer the question using a single word or phrase."

vqa.json: [{"question_id": 1, "image": "a.jpg", "question": "What colour is the bus?", "answers": ["red", ...]}, ...]
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="answer questions about pictures and score the answers, with 0 or more shots",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, bare_template=False)
    parser.add_argument("--task", choices=("vqa",), default="vqa", help="exact match and VQA accuracy (default)")
    parser.add_argument("--questions", type=local_path, required=True, metavar="FILE", help="JSON list of questions")
    parser.add_argument(
        "--images", type=local_path, metavar="DIR", help="folder of the pictures (default: that of each questions file)"
    )
    parser.add_argument(
        "--output", type=new_file, required=True, metavar="FILE", help="JSON of the scores and all answers"
    )
    parser.add_argument("--suffix", default="", metavar="TEXT", help=r"put after every question; \n is a line break")
    parser.add_argument(
        "--shots", type=whole_number(0), default=0, metavar="K", help="worked examples before each question"
    )
    parser.add_argument(
        "--shots-from", type=local_path, metavar="FILE", help="questions that the examples are drawn from"
    )
    parser.add_argument(
        "--shot-seed", type=seed, default=0, metavar="SEED", help="decides which examples (%(default)s)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="ask N questions, spread evenly over the file")
    parser.add_argument(
        "--swap-images", type=seed, metavar="SEED", help="show each question another picture: what looking is worth"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer (%(default)s)")
    parser.add_argument(
        "--batch-positions", type=positive, metavar="N", help="tokens and image tokens that are answered together"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the scores and print them; returns the exit code."""
    from megatron_vlm.evaluation.tasks.questions import load_questions, swap_pictures
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    _check(args)
    questions = load_questions(args.questions, args.images)
    pool = load_questions(args.shots_from, args.images) if args.shots_from else []
    if args.limit and args.limit < len(questions):
        questions = [questions[place * len(questions) // args.limit] for place in range(args.limit)]
    if args.swap_images is not None:
        questions = swap_pictures(questions, args.swap_images)
    with opened_model(args, args.batch_positions) as opened:
        from megatron_vlm.evaluation.run import VQAOptions, run_vqa

        options = VQAOptions(
            suffix=args.suffix.replace("\\n", "\n"),
            num_shots=args.shots,
            shot_seed=args.shot_seed,
            max_new_tokens=args.max_new_tokens,
        )
        result = run_vqa(questions, opened.generator, opened.prompt_format, opened.reader, options=options, pool=pool)
        summary = {**result.summary, "checkpoint": opened.checkpoint, "questions": str(args.questions)}
    if args.swap_images is not None:
        summary["swap_images"] = args.swap_images
    _write(args.output, {**summary, "answers": result.answers})
    print(
        f"{summary['task']}: {summary['num_questions']} questions, {summary['num_shots']} shots: "
        f"exact match {summary['exact_match']:.4f}, VQA accuracy {summary['accuracy']:.4f}, "
        f"{summary['seconds']:.1f} s, {args.output}"
    )
    return ExitCode.DONE


def _check(args: argparse.Namespace) -> None:
    if bool(args.shots) != bool(args.shots_from):
        raise UsageError(f"--shots {args.shots} and --shots-from belong together", fix="give both, or neither")


def _write(path: Path, record: dict) -> None:
    write_durably(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
