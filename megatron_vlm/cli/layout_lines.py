"""What `megatron-vlm plan --layouts` prints: ranked layouts, and why the others are left out."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from megatron_vlm.config.pipeline import count_chunks, count_layers
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.layouts import TIE, LeftOut, RankedLayout, Ranking

_NUM_SHOWN = 10
_NUM_NAMED = 3
_SPENT = {
    "attention": "attention",
    "memory": "memory bandwidth",
    "tower": "vision tower",
    "tensor_parallel": "tensor-parallel exchange",
    "context_parallel": "context-parallel exchange",
    "pipeline_parallel": "messages between stages",
    "bubble": "pipeline bubble",
    "data_parallel": "data-parallel exchange",
    "optimizer": "optimizer",
}
_NOTES = (
    "every rank's rows are as full as the mean row; TP and CP together stay inside a node; in the backward pass half "
    "of the TP exchange is hidden, and gradients and weights are exchanged while the last and the first micro-batch "
    "compute",
    "selective recomputation, which saves nothing beside flash attention, is left out",
)


def layout_facts(ranking: Ranking, cluster: Cluster, row: Work, num_layers: int) -> dict[str, Any]:
    """Return the figures as they are printed with --json."""
    return {
        "row": asdict(row),
        "assumptions": [*cluster.assumptions(), *_NOTES],
        "suggested": None if ranking.suggested is None else _ranked(ranking.suggested, num_layers),
        "fits": [_ranked(one, num_layers) for one in ranking.fits],
        "left_out": [_left_out(one, num_layers) for one in ranking.left_out],
        "given": _ranked(ranking.given, num_layers)
        if isinstance(ranking.given, RankedLayout)
        else _left_out(ranking.given, num_layers),
    }


def _ranked(one: RankedLayout, num_layers: int) -> dict[str, Any]:
    step = one.step
    return {
        "name": _name(one.settings, one.layout.data_parallel_size, num_layers),
        "settings": one.settings,
        "num_micro_batches": one.layout.num_micro_batches,
        "seconds": step.seconds,
        "mfu": step.mfu,
        "memory": one.memory,
        "spent": step.spent,
        "limit": one.limit,
        "slowest_stage": step.slowest,
        "stage_imbalance": step.imbalance,
    }


def _left_out(one: LeftOut, num_layers: int) -> dict[str, Any]:
    name = _name(one.settings, None, num_layers)
    return {"name": name, "settings": one.settings, "reason": one.reason, "fix": one.fix, "memory": one.memory}


def _name(settings: dict[str, Any], data_parallel_size: int | None, num_layers: int) -> str:
    values = {name.split(".")[1]: value for name, value in settings.items()}
    pp, first = values["pipeline_model_parallel_size"], values["num_layers_in_first_pipeline_stage"]
    layout = values["pipeline_model_parallel_layout"]
    parts = [f"TP {values['tensor_model_parallel_size']}", f"PP {pp}"]
    chunks = count_chunks(layout, pp) if layout else values["virtual_pipeline_model_parallel_size"]
    if chunks:
        parts.append(f"VPP {chunks}")
    if values["context_parallel_size"] > 1:
        parts.append(f"CP {values['context_parallel_size']}")
    if data_parallel_size:
        parts.append(f"DP {data_parallel_size}")
    name = f"{' x '.join(parts)}, micro-batch {values['micro_batch_size']}"
    if first:
        name += f", {first} layers on the first stage and {(num_layers - first) // (pp - 1)} on the others"
    if layout:
        name += f", layers {' + '.join(map(str, count_layers(layout)))}"
    return name if values["recompute"] == "none" else f"{name}, recompute {values['recompute']}"


def layout_lines(facts: dict[str, Any], world_size: int, gpu_memory: int, num_iterations: int | None) -> list[str]:
    """Return the lines for the user.

    Args:
        facts: from `layout_facts`.
        world_size: ranks of the job.
        gpu_memory: of one GPU [bytes].
        num_iterations: steps of the run, for its hours; None where the data is not known.
    """
    row, fits = facts["row"], facts["fits"]
    lines = [
        f"{world_size} ranks; a row has on average {row['num_images']:.1f} images and {row['num_tokens']:.0f} tokens, "
        f"{row['num_labels']:.0f} of them with a loss"
        + ("" if num_iterations else " (assumed: full of image-text pairs, then text)"),
        "",
        f"    step    MFU  GB a rank{'   hours' if num_iterations else ''}  layout, and what takes most beside matrix "
        "products",
    ]
    for one in fits[:_NUM_SHOWN]:
        hours = f"{one['seconds'] * num_iterations / 3600:8.1f}" if num_iterations else ""
        lines.append(f"{_figures(one)}{hours}  {one['name']}: {_limit(one)}")
    if not fits:
        lines.append(f"  no layout fits {gpu_memory / 1e9:.0f} GB a rank")
    lines += ["", *_given_lines(facts), *_left_out_lines(facts["left_out"])]
    if fits:
        name = facts["suggested"]["name"]
        lines += ["", f"settings of {name}, the simplest within {TIE:.0%} of the first:"]
        lines += [f"  {text}" for text in _overrides(facts["suggested"]["settings"])]
    lines += ["", "assumed, not measured:", *(f"  {text}" for text in facts["assumptions"])]
    return lines


def _figures(one: dict[str, Any]) -> str:
    return f"{one['seconds']:7.3f}s  {one['mfu']:5.1%}  {one['memory'] / 1e9:9.1f}"


def _limit(one: dict[str, Any]) -> str:
    return f"{_SPENT[one['limit']]} {one['spent'][one['limit']] / one['seconds']:.0%}"


def _given_lines(facts: dict[str, Any]) -> list[str]:
    given = facts["given"]
    if "seconds" not in given:
        return [f"the layout of the file, {given['name']}, is left out: {_why(given)}"]
    lines = [f"{_figures(given)}  the layout of the file, {given['name']}: {_limit(given)}"]
    if facts["fits"]:
        slower = given["seconds"] / facts["fits"][0]["seconds"] - 1
        lines[0] += f"; {slower:.1%} slower than the first" if slower > 0 else "; as fast as the first"
    return lines


def _why(left_out: dict[str, Any]) -> str:
    return left_out["reason"] if left_out["fix"] is None else f"{left_out['reason']}; fix: {left_out['fix']}"


def _left_out_lines(left_out: Iterable[dict[str, Any]]) -> list[str]:
    """Return one line for layouts that the same would help; of those that are too large, the smallest come first."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for one in sorted(left_out, key=lambda one: one["memory"] or 0):
        groups.setdefault(one["fix"], []).append(one)
    lines = ["", "left out:"] if groups else []
    for fix, members in groups.items():
        shown = members[:_NUM_NAMED]
        rest = f"; and {len(members) - len(shown)} more" if len(members) > len(shown) else ""
        if fix is None:
            lines.append("  too large: " + "; ".join(f"{one['name']}: {one['reason']}" for one in shown) + rest)
        else:
            names = "; ".join(one["name"] for one in shown)
            lines.append(f"  {names}{rest}: {members[0]['reason']}; fix: {fix}")
    return lines


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={'null' if value is None else str(value).lower()}" for name, value in settings.items()]
