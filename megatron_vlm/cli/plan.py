"""`megatron-vlm plan`: what a run will hold and cost, without a GPU."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.cli.options import add_command, add_config
from megatron_vlm.cli.values import number, positive
from megatron_vlm.config import PART_NAMES, ExitCode, TrainConfig, UsageError, UserError, derive_layout, load_config
from megatron_vlm.platform.gpus import GPUS

if TYPE_CHECKING:
    from megatron_vlm.costs.activations import Backend

_TEXT = "estimate memory, pipeline balance, packing and GPU hours of a run, or rank its layouts, without a GPU"
_EXAMPLES = (
    "plan examples/vila_7b/pretrain.yaml --world-size 128",
    "plan train.yaml parallel.tensor_model_parallel_size=4 --world-size 32 --no-data",
    "plan train.yaml --balance 8,64,512",
    "plan examples/vila_7b/pretrain.yaml --world-size 64 --layouts --gpu H100 --infiniband 25 --no-data",
)
_NOTES = """Parameter counts are exact, and so is the packing, which is the one that train uses. Activations are those
of rows full of images, or of text with a loss at every position, whichever takes more. Step times of --layouts come
from data sheets and assumed efficiencies, which are printed with them.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = add_command(subparsers, "plan", _TEXT, *_EXAMPLES, notes=_NOTES)
    add_config(parser)
    add = parser.add_argument
    add("--world-size", type=positive, metavar="N", help="ranks of the job (default: one data-parallel replica)")
    add("--gpu", choices=sorted(GPUS), default="A100", help="(default: %(default)s)")
    text = "fraction of the GPU's peak that training reaches (default: %(default)s)"
    add("--mfu", type=number(0, 1), default=0.4, metavar="X", help=text)
    add("--no-data", action="store_true", help="leave out the packing, for shards that do not exist yet")
    text = "numbers of data-parallel ranks: compare how evenly images and attention work are spread with random order"
    add("--balance", type=_sizes, default=(), metavar="N[,N]", help=text)
    add(
        "--layouts", action="store_true", help="rank the layouts that fit --world-size and --gpu by predicted step time"
    )
    for name, link in (("nvlink", "to GPUs of its node"), ("infiniband", "to other nodes")):
        text = f"with --layouts: what a GPU sends {link} [GB/s] (default: the data sheet's)"
        add(f"--{name}", type=number(0), metavar="X", help=text)
    add("--gpus-per-node", type=positive, metavar="N", help="with --layouts (default: 8)")
    add("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from megatron_vlm.data.plan.balance_report import check_sizes

    _check(args)
    config = load_config(TrainConfig, args.config, args.overrides)
    check_sizes(args.balance, config.training.global_batch_size)
    if args.layouts:
        facts, lines = _layouts(config, args)
    else:
        facts = _memory(config, args.world_size or _replica(config))
        if not args.no_data:
            facts["data"] = _data(config, facts["world_size"], GPUS[args.gpu].peak_flops * args.mfu, args.balance)
        lines = _lines(facts, f"{args.gpu} at {args.mfu:.0%} of its peak")
    sys.stdout.write(json.dumps(facts, indent=2) + "\n" if args.json else "\n".join(lines) + "\n")
    return ExitCode.DONE


def _check(args: argparse.Namespace) -> None:
    if args.balance and args.no_data:
        raise UsageError("--balance needs the packed rows, which --no-data leaves out", fix="give only one of them")
    if args.mfu == 0:
        raise UsageError("--mfu 0 means that the run never ends", fix="give a number up to 1, e.g. 0.4")
    if args.layouts and args.balance:
        raise UsageError("--layouts prints no balance", fix="give --layouts or --balance")
    if args.layouts and args.world_size is None:
        raise UsageError("--layouts needs the number of ranks", fix="give --world-size N")
    for name in ("nvlink", "infiniband", "gpus_per_node"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not args.layouts:
            raise UsageError(f"{flag} only matters for --layouts", fix=f"add --layouts, or leave {flag} out")
        if value == 0:
            raise UsageError(f"{flag} 0 means that no step ever ends", fix="give GB/s per GPU and direction, e.g. 25")


def _replica(config: TrainConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _backend(config: TrainConfig) -> "Backend":
    """Return the layers that this environment would use on a GPU."""
    if config.model.backend != "auto":
        return config.model.backend
    return "torch" if importlib.util.find_spec("transformer_engine") is None else "transformer_engine"


def _layouts(config: TrainConfig, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_vlm.cli.layout_lines import layout_facts, layout_lines
    from megatron_vlm.costs.cluster import Cluster
    from megatron_vlm.costs.layouts import rank_layouts
    from megatron_vlm.costs.outlook import foresee
    from megatron_vlm.costs.rows import pairs

    row = num_iterations = None
    if not args.no_data:
        outlook = foresee(config, _open(config))
        row, num_iterations = outlook.work.times(1 / outlook.packing.num_rows), outlook.packing.num_iterations
    cluster = Cluster(
        gpu_name=args.gpu,
        gpus_per_node=args.gpus_per_node or 8,
        nvlink=None if args.nvlink is None else args.nvlink * 1e9,
        infiniband=None if args.infiniband is None else args.infiniband * 1e9,
    )
    ranking = rank_layouts(config, args.world_size, cluster, backend=_backend(config), row=row)
    assumed = pairs(config).times(1 / config.training.micro_batch_size)
    facts = layout_facts(ranking, cluster, row or assumed, config.model.language.num_layers)
    facts = {"world_size": args.world_size, "gpu": args.gpu, "num_iterations": num_iterations, **facts}
    return facts, layout_lines(facts, args.world_size, cluster.gpu.memory, num_iterations)


def _memory(config: TrainConfig, world_size: int) -> dict[str, Any]:
    from megatron_vlm.costs.memory import LIBRARIES, estimate_memory
    from megatron_vlm.costs.parameters import stage_sizes
    from megatron_vlm.costs.time import pipeline_bubble

    layout = derive_layout(config, world_size)
    stages = []
    for stage, size in enumerate(stage_sizes(config)):
        memory = estimate_memory(config, stage, layout.data_parallel_size, backend=_backend(config))
        peaks = {"peak": memory.peak, "total": memory.total}
        stages.append({**asdict(size), **asdict(memory), **peaks})
    return {
        **asdict(layout),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "context_parallel_size": config.parallel.context_parallel_size,
        "layout": config.parallel.describe(layout.data_parallel_size),
        "bubble": pipeline_bubble(config.parallel, layout),
        "backend": _backend(config),
        "libraries": LIBRARIES,
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
        "num_labels": outlook.work.num_labels,
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
    from megatron_vlm.data.plan.row_lengths import choose_row_length, compare_row_lengths
    from megatron_vlm.data.plan.settings import PlanSettings

    if not config.data.packing:
        return {}
    candidates = compare_row_lengths(PlanSettings.from_config(config), datasets)
    best = choose_row_length(candidates, config.data.seq_length)
    return {"row_lengths": [asdict(candidate) for candidate in candidates], "best_row_length": best.seq_length}


def _lines(facts: dict[str, Any], machine: str) -> list[str]:
    lines = [
        f"{facts['world_size']} ranks = {facts['layout']}; {facts['num_micro_batches']} "
        f"micro-batches of {facts['tokens_per_micro_batch']} tokens a step, {facts['bubble']:.1%} pipeline bubble",
        "",
        "stage  layers  parameters  learning   weights  gradients  optimizer  activations      peak   (a rank)",
    ]
    for index, stage in enumerate(facts["stages"]):
        parameters = sum(stage[part] for part in (*PART_NAMES, "adapter"))
        lines.append(
            f"{index:5d}  {stage['num_layers']:6d}  {parameters / 1e6:8.1f} M  {stage['learning'] / 1e6:6.1f} M"
            f"  {_gib(stage['weights'])}  {_gib(stage['gradients'], 9)}  {_gib(stage['optimizer'], 9)}"
            f"  {_gib(stage['activations'], 11)}  {_gib(stage['peak'])}"
        )
    lines += ["", *_memory_lines(facts)]
    data = facts.get("data")
    if data is None:
        return lines
    shares = " : ".join(f"{share:.1%}" for share in data["stage_fractions"])
    lines += [
        "",
        f"{data['num_samples']} samples with {data['num_images']} images in {data['num_rows']} rows: "
        f"{data['num_iterations']} iterations, {data['utilisation']:.2%} of the positions used, "
        f"of all samples of the datasets, longer than a row: {data['truncated']} cut, {data['split']} split, "
        f"{data['dropped']} left out{_without_labels(data)}",
        *(f"the blend changes after iteration {iteration}" for iteration in data["step_iterations"]),
        *_image_lines(data),
        *_clustering_lines(data),
        f"{data['num_tokens'] / 1e6:.1f} M tokens, {data['num_labels'] / 1e6:.1f} M with a loss; work of the stages "
        f"{shares}, the slowest {data['stage_imbalance']:.1%} above the mean",
        f"{data['flops']:.3g} operations: {data['gpu_hours']:.3g} GPU hours on {machine}, {data['hours']:.3g} hours on "
        f"{facts['world_size']} of them",
        *_row_length_lines(data),
        *_balance_lines(data),
    ]
    return lines


def _memory_lines(facts: dict[str, Any]) -> list[str]:
    fullest = max(facts["stages"], key=lambda stage: stage["peak"])
    starts = [
        f"stage {index} holds most at the start, when its weights stand twice beside the gradients: "
        f"{_gib(stage['peak'], 0)}"
        for index, stage in enumerate(facts["stages"])
        if stage["start"] == stage["peak"]
    ]
    return [
        *starts,
        f"NCCL, CUDA and workspaces: {_gib(facts['libraries'], 0)} on top (experience says 2 to 4, not measured here); "
        f"then the fullest rank needs {fullest['total'] / 1e9:.1f} GB",
    ]


def _without_labels(data: dict[str, Any]) -> str:
    number = sum(data["nothing_to_train"])
    return f", {number} left out because the cut leaves them nothing to train" if number else ""


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
