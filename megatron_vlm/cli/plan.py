"""`megatron-vlm plan`: what a run will hold and cost, without a GPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vlm.cli.options import add_command
from megatron_vlm.cli.values import number, positive
from megatron_vlm.config import PART_NAMES, ExitCode, TrainConfig, UsageError, UserError, derive_layout, load_config
from megatron_vlm.platform.machine import PEAK_FLOPS

_TEXT = "estimate memory, pipeline balance, packing and GPU hours of a run, without a GPU"
_EXAMPLES = (
    "plan examples/vila_7b/pretrain.yaml --world-size 128",
    "plan train.yaml parallel.tensor_model_parallel_size=4 --world-size 32 --no-data",
    "plan train.yaml --balance 8,64,512",
)
_NOTES = """Parameter counts are exact, and so is the packing, which is the one that train uses. Memory for activations
does not include what libraries keep for themselves.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = add_command(subparsers, "plan", _TEXT, *_EXAMPLES, notes=_NOTES)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of the stage")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    add("--world-size", type=positive, metavar="N", help="ranks of the job (default: one data-parallel replica)")
    add("--gpu", choices=sorted(PEAK_FLOPS), default="A100", help="(default: %(default)s)")
    text = "fraction of the GPU's peak that training reaches (default: %(default)s)"
    add("--mfu", type=number(0, 1), default=0.4, metavar="X", help=text)
    add("--no-data", action="store_true", help="leave out the packing, for shards that do not exist yet")
    text = "numbers of data-parallel ranks: compare how evenly images and attention work are spread with random order"
    add("--balance", type=_sizes, default=(), metavar="N[,N]", help=text)
    add("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from megatron_vlm.data.plan.balance_report import check_sizes

    if args.balance and args.no_data:
        raise UsageError("--balance needs the packed rows, which --no-data leaves out", fix="give only one of them")
    if args.mfu == 0:
        raise UsageError("--mfu 0 means that the run never ends", fix="give a number up to 1, e.g. 0.4")
    config = load_config(TrainConfig, args.config, args.overrides)
    check_sizes(args.balance, config.training.global_batch_size)
    parallel = config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    facts = _memory(config, args.world_size or replica)
    if not args.no_data:
        facts["data"] = _data(config, facts["world_size"], PEAK_FLOPS[args.gpu] * args.mfu, args.balance)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write(_as_text(facts, f"{args.gpu} at {args.mfu:.0%} of its peak"))
    return ExitCode.DONE


def _memory(config: TrainConfig, world_size: int) -> dict[str, Any]:
    from megatron_vlm.costs.memory import estimate_memory
    from megatron_vlm.costs.parameters import stage_sizes
    from megatron_vlm.costs.time import pipeline_bubble

    layout = derive_layout(config, world_size)
    stages = []
    for stage, size in enumerate(stage_sizes(config)):
        memory = estimate_memory(config, stage, layout.data_parallel_size)
        learning = size.learning(config.training.freeze)
        stages.append({**asdict(size), "learning": learning, **asdict(memory), "total": memory.total})
    return {
        **asdict(layout),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "bubble": pipeline_bubble(config.parallel, layout),
        "stages": stages,
    }


def _data(
    config: TrainConfig, world_size: int, flops_per_second: float, data_parallel_sizes: Sequence[int]
) -> dict[str, Any]:
    from megatron_vlm.costs.outlook import foresee
    from megatron_vlm.costs.time import gpu_hours, stage_imbalance

    datasets = _open(config)
    outlook = foresee(config, datasets, data_parallel_sizes)
    hours = gpu_hours(outlook.flops, flops_per_second)
    return {
        **asdict(outlook.packing),
        "num_labels": outlook.num_labels,
        "flops": outlook.flops,
        "stage_fractions": outlook.stage_fractions,
        "stage_imbalance": stage_imbalance(outlook.stage_fractions),
        "gpu_hours": hours,
        "hours": hours / world_size,
        "shortest_row": outlook.row_lengths[0],
        "longest_row": outlook.row_lengths[1],
        "balance": [asdict(balance) for balance in outlook.balance],
        **_row_lengths(config, datasets),
    }


def _open(config: TrainConfig) -> Sequence[Any]:
    from megatron_vlm.data.loading.checks import check_data

    try:
        return check_data(config)
    except UserError as error:
        paths = [config.data.tokenizer, *(entry.path for entry in config.data.blend)]
        if all(Path(path).exists() for path in paths):
            raise
        raise type(error)(error.what, where=error.where, fix=f"{error.fix}, or plan without it: --no-data") from None


def _row_lengths(config: TrainConfig, datasets: Sequence[Any]) -> dict[str, Any]:
    from megatron_vlm.data.plan.compute import PlanSettings
    from megatron_vlm.data.plan.row_lengths import choose_row_length, compare_row_lengths

    if not config.data.packing:
        return {}
    candidates = compare_row_lengths(PlanSettings.from_config(config), datasets)
    best = choose_row_length(candidates, config.data.seq_length)
    return {"row_lengths": [asdict(candidate) for candidate in candidates], "best_row_length": best.seq_length}


def _as_text(facts: dict[str, Any], machine: str) -> str:
    lines = [
        f"{facts['world_size']} ranks = TP {facts['tensor_model_parallel_size']} x PP "
        f"{facts['pipeline_model_parallel_size']} x DP {facts['data_parallel_size']}; {facts['num_micro_batches']} "
        f"micro-batches of {facts['tokens_per_micro_batch']} tokens a step, {facts['bubble']:.1%} pipeline bubble",
        "",
        "stage  layers  parameters  learning   weights  gradients  optimizer  activations     total   (a rank)",
    ]
    for index, stage in enumerate(facts["stages"]):
        parameters = sum(stage[part] for part in (*PART_NAMES, "adapter"))
        lines.append(
            f"{index:5d}  {stage['num_layers']:6d}  {parameters / 1e6:8.1f} M  {stage['learning'] / 1e6:6.1f} M"
            f"  {_gib(stage['weights'])}  {_gib(stage['gradients'], 9)}  {_gib(stage['optimizer'], 9)}"
            f"  {_gib(stage['activations'], 11)}  {_gib(stage['total'])}"
        )
    data = facts.get("data")
    if data is None:
        return "\n".join(lines) + "\n"
    shares = " : ".join(f"{share:.1%}" for share in data["stage_fractions"])
    lines += [
        "",
        f"{data['num_samples']} samples with {data['num_images']} images in {data['num_rows']} rows: "
        f"{data['num_iterations']} iterations, {data['utilisation']:.2%} of the positions used, "
        f"of all samples of the datasets, longer than a row: {data['truncated']} cut, {data['split']} split, "
        f"{data['dropped']} left out",
        *_image_lines(data),
        *_clustering_lines(data),
        f"{data['num_tokens'] / 1e6:.1f} M tokens, {data['num_labels'] / 1e6:.1f} M with a loss; work of the stages "
        f"{shares}, the slowest {data['stage_imbalance']:.1%} above the mean",
        f"{data['flops']:.3g} operations: {data['gpu_hours']:.3g} GPU hours on {machine}, {data['hours']:.3g} hours on "
        f"{facts['world_size']} of them",
        *_row_length_lines(data),
        *_balance_lines(data),
    ]
    return "\n".join(lines) + "\n"


def _row_length_lines(data: dict[str, Any]) -> list[str]:
    if "row_lengths" not in data:
        return []
    lines = ["", "data.seq_length  positions used  samples too long   (one pass; the best row cuts no more samples)"]
    for row in data["row_lengths"]:
        best = "  <- wastes least" if row["seq_length"] == data["best_row_length"] else ""
        lines.append(f"{row['seq_length']:15d}  {row['utilisation']:14.2%}  {row['too_long']:16.3%}{best}")
    return lines


def _image_lines(data: dict[str, Any]) -> list[str]:
    fewest, most = data["fewest_image_tokens"], data["most_image_tokens"]
    return [] if fewest == most else [f"{fewest} to {most} tokens per image, depending on its size"]


def _clustering_lines(data: dict[str, Any]) -> list[str]:
    if data["shortest_row"] == data["longest_row"]:
        return []
    return [f"rows of {data['shortest_row']} to {data['longest_row']} tokens, as long as each global batch needs"]


def _balance_lines(data: dict[str, Any]) -> list[str]:
    if not data["balance"]:
        return []
    lines = [
        "",
        "load of the fullest data-parallel rank over the mean     this plan  random order  any order in its batches",
    ]
    for row in data["balance"]:
        name = f"{row['load']} on {row['data_parallel_size']} ranks"
        lines.append(f"  {name:51s}  {row['planned']:11.4f}  {row['random']:12.4f}  {row['lower_bound']:24.4f}")
    return lines


def _gib(size: int, width: int = 8) -> str:
    return f"{f'{size / 2**30:.2f} GiB':>{width}}"
