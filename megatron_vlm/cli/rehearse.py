"""`megatron-vlm rehearse`: play ranks of a job at full size, without a GPU, before the job starts."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.options import add_command, add_config
from megatron_vlm.cli.values import positive, whole_number
from megatron_vlm.config import ExitCode, TrainConfig, UsageError, derive_layout, load_config
from megatron_vlm.platform.files.run_folder import PLAN_FOLDER
from megatron_vlm.platform.gpus import GPUS
from megatron_vlm.platform.log_format import setup_logging
from megatron_vlm.platform.machine import count_cores

if TYPE_CHECKING:
    from megatron_vlm.config import Layout
    from megatron_vlm.training.rehearsal.job import Rehearsal

_TEXT = "play ranks of a job at full size without a GPU: memory, waits of the host, and whether collectives match"
_EXAMPLES = (
    "rehearse examples/vila_7b/pretrain.yaml --world-size 128",
    "rehearse train.yaml parallel.tensor_model_parallel_size=4 --world-size 32 --gpu H100 --ranks 0,4,31",
)
_NOTES = """The code is that of train: model, gradient buffers, schedule, collectives, optimizer. Tensors have no
values, and a collective returns at once. Played are the layers of torch, also where the job has transformer-engine.
Rows come from the shards of CONFIG; where they do not exist yet, rows with many, no, one and three images are made up.
On a CPU build of torch a small part is compiled once, which needs a C++ compiler. Exits with 78 if the job does not fit
the GPU, or if ranks of a group call different collectives.
"""
_WAYS = ("one-per-stage", "all")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = add_command(subparsers, "rehearse", _TEXT, *_EXAMPLES, notes=_NOTES)
    add_config(parser)
    add = parser.add_argument
    add("--world-size", type=positive, metavar="N", required=True, help="ranks of the job")
    text = "one-per-stage (default: with one more of its tensor- and data-parallel groups, to compare), all, or numbers"
    add("--ranks", type=_ranks, default="one-per-stage", metavar="RANKS", help=text)
    add("--iterations", type=positive, default=2, metavar="K", help="steps; the first makes Adam's state (default: 2)")
    text = "micro-batches of a step (default: enough to fill the pipeline and mix rows); the rest repeats"
    add("--micro-batches", type=positive, metavar="N", help=text)
    add("--gpu", choices=sorted(GPUS), default="A100", help="whose memory must suffice (default: %(default)s)")
    add("--no-data", action="store_true", help="make up rows even if the shards exist")
    add("--workers", type=positive, default=count_cores(), metavar="N", help="processes (default: one per core)")
    add("--json", action="store_true", help="print everything as JSON, with the collectives of each rank in order")
    parser.set_defaults(run=run)


def _ranks(text: str) -> str | tuple[int, ...]:
    if text in _WAYS:
        return text
    return tuple(sorted({whole_number(0)(part) for part in text.split(",")}))


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from megatron_vlm.cli.rehearsal_text import outcome_text
    from megatron_vlm.data.tasks.processes import run_tasks
    from megatron_vlm.platform.fake_device.guard import build_guard
    from megatron_vlm.training.rehearsal.job import play_rank
    from megatron_vlm.training.rehearsal.outcome import check_outcome, describe_outcome

    setup_logging()
    config = load_config(TrainConfig, args.config, args.overrides)
    layout = derive_layout(config, args.world_size)
    ranks = _choose_ranks(args.ranks, config, layout)
    build_guard()  # once, before several processes need it
    with _prepared(args, config, layout) as rehearsal:
        tasks = [(rehearsal, rank) for rank in ranks]
        played = run_tasks(play_rank, tasks, num_workers=args.workers, unit="ranks")
    facts = describe_outcome(rehearsal, played, GPUS[args.gpu].memory)
    sys.stdout.write(json.dumps(facts, indent=2) + "\n" if args.json else outcome_text(facts, config, args.gpu))
    sys.stdout.flush()
    check_outcome(facts, config, args.gpu)
    return ExitCode.DONE


def _choose_ranks(asked: str | tuple[int, ...], config: TrainConfig, layout: "Layout") -> tuple[int, ...]:
    from megatron_vlm.training.rehearsal.job import ranks_to_play

    if asked == "all":
        return tuple(range(layout.world_size))
    if asked == "one-per-stage" or isinstance(asked, str):
        return ranks_to_play(config, layout)
    if asked[-1] >= layout.world_size:
        raise UsageError(
            f"--ranks names {asked[-1]}, the job has ranks 0 to {layout.world_size - 1}",
            fix="name ranks of the job, or raise --world-size",
        )
    return asked


@contextmanager
def _prepared(args: argparse.Namespace, config: TrainConfig, layout: "Layout") -> Iterator["Rehearsal"]:
    """Yield what to play; the plan of the data stands in a folder that is gone afterwards."""
    from megatron_vlm.training.rehearsal.job import Rehearsal, micro_batches_to_play, playable

    count = min(args.micro_batches or micro_batches_to_play(config, layout), layout.num_micro_batches)
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_") as folder:
        has_data = not args.no_data and _write_plan(config, Path(folder))
        yield Rehearsal(
            config=playable(config, folder),
            layout=layout,
            iterations=args.iterations,
            num_micro_batches=count,
            has_data=has_data,
        )


def _write_plan(config: TrainConfig, run_dir: Path) -> bool:
    """Write the plan of the run's data; False if tokenizer or shards do not exist yet."""
    from megatron_vlm.data.loading.checks import check_data
    from megatron_vlm.data.plan.plan import build_plan
    from megatron_vlm.data.plan.settings import PlanSettings

    paths = [config.data.tokenizer, *(entry.path for entry in config.data.blend)]
    if not all(Path(path).exists() for path in paths):
        return False
    build_plan(PlanSettings.from_config(config), check_data(config), run_dir / PLAN_FOLDER)
    return True
