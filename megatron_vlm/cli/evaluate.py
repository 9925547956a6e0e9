"""`megatron-vlm evaluate`: answer the questions of a benchmark and score the answers."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from megatron_vlm.cli.model_options import add_model_options, open_from_options
from megatron_vlm.cli.options import add_command, add_options, read_options
from megatron_vlm.cli.values import local_path, new_file, positive, seed
from megatron_vlm.config import ExitCode, UsageError
from megatron_vlm.config.inference import EvaluationOptions
from megatron_vlm.config.modules import module_names
from megatron_vlm.platform.files.durable import write_durably

_TEXT = "answer questions about images and score the answers, zero-shot or with worked examples"
_EXAMPLE = r"""evaluate runs/sft --task vqa --questions vqa.json --images pictures --output answers.json \
      --suffix "\nAnswer the question using a single word or phrase." """
_NOTES = """questions of the task vqa:
  [{"question_id": 1, "image": "a.jpg", "question": "What colour is the bus?", "answers": ["red", ...]}, ...]
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = add_command(subparsers, "evaluate", _TEXT, _EXAMPLE.strip(), notes=_NOTES)
    add_model_options(parser)
    add = parser.add_argument
    tasks = module_names("megatron_vlm.evaluation.tasks")
    add("--task", choices=tasks, default="vqa", help="benchmark (default: %(default)s)")
    add("--questions", type=local_path, required=True, metavar="FILE", help="questions, in the format of the task")
    add("--images", type=local_path, metavar="DIR", help="image folder (default: the folder of each questions file)")
    add("--output", type=new_file, required=True, metavar="FILE", help="JSON file for the scores and all answers")
    add_options(parser, EvaluationOptions)
    add("--shots-from", type=local_path, metavar="FILE", help="questions from which worked examples are drawn")
    add("--limit", type=positive, metavar="N", help="ask only N questions, spread evenly over the file")
    text = "show each question another question's image, to measure how much the images matter"
    add("--swap-images", type=seed, metavar="SEED", help=text)
    add("--batch-positions", type=positive, metavar="N", help="text and image tokens processed together")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the scores and print them; returns the exit code."""
    from megatron_vlm.platform.log_format import setup_logging

    setup_logging()
    options = read_options(args, EvaluationOptions)
    options = replace(options, suffix=options.suffix.replace("\\n", "\n"))
    if bool(options.num_shots) != bool(args.shots_from):
        raise UsageError(f"--shots {options.num_shots} and --shots-from belong together", fix="give both, or neither")
    from megatron_vlm.evaluation.questions import spread, swap_pictures
    from megatron_vlm.evaluation.task import find_task

    load = find_task(args.task).load
    questions = spread(load(args.questions, args.images), args.limit)
    pool = load(args.shots_from, args.images) if args.shots_from else []
    if args.swap_images is not None:
        questions = swap_pictures(questions, args.swap_images)
    from megatron_vlm.platform.device import prepare_process

    prepare_process()  # before anything that imports megatron-core
    from megatron_vlm.evaluation.run import choose_asked, evaluate

    asked = choose_asked(questions, options, pool)
    with open_from_options(args, args.batch_positions) as model:
        result = evaluate(args.task, asked, model, options=options)
        facts = {"checkpoint": model.checkpoint, "questions": str(args.questions)}
    if args.swap_images is not None:
        facts["swap_images"] = args.swap_images
    _write(args.output, {**result.summary, **facts, "answers": result.answers})
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.figures.items())
    print(
        f"{args.task}: {len(questions)} questions, {options.num_shots} shots: {figures}, "
        f"{result.summary['seconds']:.1f} s, {args.output}"
    )
    return ExitCode.DONE


def _write(path: Path, record: dict) -> None:
    write_durably(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
