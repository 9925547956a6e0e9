"""What a rehearsal found: for each pipeline stage, for the groups, and whether the job can run. Needs no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_vlm.config import ConfigError, TrainConfig
from megatron_vlm.costs.memory import LIBRARIES, estimate_memory
from megatron_vlm.platform.fake_device.events import Collective, HostWait
from megatron_vlm.training.rehearsal.comparison import compare_ranks
from megatron_vlm.training.rehearsal.facts import RankFacts
from megatron_vlm.training.rehearsal.job import Rehearsal

_MEMORY = ("weights", "gradients", "optimizer", "activations", "peak")


def describe_outcome(rehearsal: Rehearsal, played: Sequence[RankFacts], gpu_memory: int) -> dict[str, Any]:
    """Return everything that was found as plain values, as `rehearse --json` prints it.

    Args:
        rehearsal: what was played.
        played: its ranks.
        gpu_memory: of the GPU that the job is for [bytes].
    """
    compared, differences = compare_ranks(played)
    stages = sorted({facts.pp_rank for facts in played})
    return {
        **asdict(rehearsal.layout),
        "played_ranks": [facts.rank for facts in played],
        "played_micro_batches": rehearsal.num_micro_batches,
        "iterations": rehearsal.iterations,
        "rows": "shards" if rehearsal.has_data else "made up",
        "gpu_memory": gpu_memory,
        "libraries": LIBRARIES,
        "stages": [_stage(rehearsal, [f for f in played if f.pp_rank == stage], gpu_memory) for stage in stages],
        "ranks": [_rank(facts) for facts in played],
        "compared": [
            {
                "group": one.group.name,
                "group_size": len(one.group.ranks),
                "ranks": one.ranks,
                "calls": one.num_calls,
                "messages": one.are_messages,
            }
            for one in compared
        ],
        "differences": [{"summary": one.summarise(), "whole": one.describe()} for one in differences],
    }


def _stage(rehearsal: Rehearsal, played: Sequence[RankFacts], gpu_memory: int) -> dict[str, Any]:
    """Describe the rank of a stage that holds most."""
    facts = max(played, key=lambda one: one.peak)
    plan = estimate_memory(rehearsal.config, facts.pp_rank, rehearsal.layout.data_parallel_size)
    return {
        "stage": facts.pp_rank,
        "rank": facts.rank,
        **{name: getattr(facts, name) for name in _MEMORY},
        "peaks": facts.peaks,
        "plan": {**asdict(plan), "peak": plan.peak},
        "fits": facts.peak + LIBRARIES <= gpu_memory,
        "waits": _list_waits(facts.waits),
    }


def _rank(facts: RankFacts) -> dict[str, Any]:
    return {
        "rank": facts.rank,
        "stage": facts.pp_rank,
        "tensor_parallel_rank": facts.tp_rank,
        "context_parallel_rank": facts.cp_rank,
        "data_parallel_rank": facts.dp_rank,
        "parameters": facts.parameters,
        "learning": facts.learning,
        "images": facts.image_counts,
        "labels": facts.label_counts,
        **{name: getattr(facts, name) for name in _MEMORY},
        "peaks": facts.peaks,
        "checkpoint": facts.checkpoint,
        "waits": _list_waits(facts.waits),
        "collectives": _list_collectives(facts.collectives),
    }


def _list_waits(waits: Counter[HostWait]) -> list[dict[str, Any]]:
    return [{"count": count, "kind": wait.kind, "where": wait.where} for wait, count in waits.most_common()]


def _list_collectives(calls: Sequence[Collective]) -> list[dict[str, Any]]:
    """Return the calls in order; neighbours that are alike in all but their size are one entry."""
    listed: list[dict[str, Any]] = []
    for call in calls:
        entry = {
            "op": call.op,
            "group": call.group.name,
            "group_size": len(call.group.ranks),
            "dtype": call.dtype,
            "where": call.where,
            "peer": call.peer,
        }
        if listed and {key: listed[-1][key] for key in entry} == entry:
            listed[-1]["sizes"].append(call.sizes)
        else:
            listed.append({**entry, "sizes": [call.sizes]})
    return listed


def check_outcome(facts: dict[str, Any], config: TrainConfig, gpu_name: str) -> None:
    """Check that the job fits the GPU and that its ranks agree.

    Raises:
        ConfigError: a stage does not fit, or ranks of a group call different collectives.
    """
    if facts["differences"]:
        more = len(facts["differences"]) - 1
        raise ConfigError(
            facts["differences"][0]["summary"] + (f" (and {more} more)" if more else ""),
            fix="call the same on every rank, whatever its rows hold",
        )
    worst = max(facts["stages"], key=lambda stage: stage["peak"])
    if not worst["fits"]:
        needed = worst["peak"] + facts["libraries"]
        raise ConfigError(
            f"stage {worst['stage']} needs {needed / 2**30:.1f} GiB with NCCL, CUDA and workspaces, {gpu_name} has "
            f"{facts['gpu_memory'] / 2**30:.1f}",
            fix=_ways_to_fit(config, worst),
        )


def _ways_to_fit(config: TrainConfig, stage: dict[str, Any]) -> str:
    """Name the settings that lower what the stage holds most of."""
    parallel, training = config.parallel, config.training
    state = stage["weights"] + stage["gradients"] + stage["optimizer"]
    ways = []
    if stage["activations"] > state:
        if training.micro_batch_size > 1:
            ways.append(f"training.micro_batch_size={training.micro_batch_size // 2}")
        if training.recompute != "full":
            ways.append("training.recompute=full")
    ways.append(f"parallel.tensor_model_parallel_size={2 * parallel.tensor_model_parallel_size}")
    if not parallel.use_distributed_optimizer:
        ways.insert(0, "parallel.use_distributed_optimizer=true")
    elif stage["activations"] <= state:
        ways.append(f"parallel.pipeline_model_parallel_size={2 * parallel.pipeline_model_parallel_size}")
    return f"set {', or '.join(ways)}"
