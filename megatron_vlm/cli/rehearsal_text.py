"""The outcome of a rehearsal as text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_vlm.config import TrainConfig
from megatron_vlm.costs.rows import TEXT_OF_PAIR
from megatron_vlm.training.rehearsal.facts import BUILD
from megatron_vlm.training.rehearsal.job import FEW_IMAGES

_MEMORY = ("weights", "gradients", "optimizer", "activations", "peak")
_MOST_WAITS = 12


def outcome_text(facts: dict[str, Any], config: TrainConfig, gpu_name: str) -> str:
    """Return the lines that `rehearse` prints.

    Args:
        facts: of `describe_outcome`.
        config: settings of the run, as given.
        gpu_name: the GPU whose memory must suffice.
    """
    lines = [*_heading(facts, config), "", *_memory_lines(facts, gpu_name), ""]
    for stage in facts["stages"]:
        lines += _wait_lines(stage)
    lines += ["", *_collective_lines(facts), "", _checkpoint_line(facts)]
    return "\n".join(lines) + "\n"


def _heading(facts: dict[str, Any], config: TrainConfig) -> Iterator[str]:
    yield (
        f"{facts['world_size']} ranks = {config.parallel.describe(facts['data_parallel_size'])}; played: rank "
        f"{', '.join(map(str, facts['played_ranks']))}, {facts['iterations']} steps, "
        f"{facts['played_micro_batches']} of {facts['num_micro_batches']} micro-batches"
    )
    images = " / ".join(str(count) for count in facts["ranks"][0]["images"])
    if facts["rows"] == "shards":
        yield f"rows are the first of the run's plan; images in the micro-batches of rank {_first(facts)}: {images}"
    else:
        yield (
            f"rows are made up, without shards: images with {TEXT_OF_PAIR} tokens of text, as many as fit or "
            f"{', '.join(map(str, FEW_IMAGES))}, then text; rank {_first(facts)}: {images}"
        )
    if config.model.backend != "torch" or config.training.fp8:
        yield "played with torch's layers in the precision of the weights; transformer-engine keeps other activations"


def _first(facts: dict[str, Any]) -> int:
    return facts["ranks"][0]["rank"]


def _memory_lines(facts: dict[str, Any], gpu_name: str) -> Iterator[str]:
    is_large = any(stage["peak"] >= 2**30 for stage in facts["stages"])
    unit, size = ("GiB", 2**30) if is_large else ("MiB", 2**20)
    yield f"stage   rank {''.join(f'{name:>17s}' for name in _MEMORY)}   [{unit}; in brackets: plan]"
    for stage in facts["stages"]:
        pairs = [(stage[name] / size, stage["plan"][name] / size) for name in _MEMORY]
        cells = "".join(f"{f'{found:.2f} ({planned:.2f})':>17s}" for found, planned in pairs)
        yield f"{stage['stage']:5d}  {stage['rank']:5d} {cells}   {stage['peaks'][BUILD] / size:.2f} while it is built"
    yield (
        f"NCCL, CUDA, workspaces and gaps between tensors: {facts['libraries'] / 2**30:.1f} GiB more are assumed; "
        f"{gpu_name} has {facts['gpu_memory'] / 2**30:.1f} GiB"
    )


def _checkpoint_line(facts: dict[str, Any]) -> str:
    largest = max(facts["ranks"], key=lambda rank: rank["checkpoint"])
    return (
        f"of a checkpoint a played rank writes at most {largest['checkpoint'] / 2**20:.1f} MiB (rank {largest['rank']})"
    )


def _wait_lines(stage: dict[str, Any]) -> Iterator[str]:
    waits = stage["waits"]
    total = sum(wait["count"] for wait in waits)
    yield f"stage {stage['stage']}: the host waits for the device {total} times in a step"
    for wait in waits[:_MOST_WAITS]:
        yield f"  {wait['count']:6d}  {wait['kind']:11s}  {wait['where']}"
    if len(waits) > _MOST_WAITS:
        yield f"  {sum(wait['count'] for wait in waits[_MOST_WAITS:]):6d}  in {len(waits) - _MOST_WAITS} more places"


def _collective_lines(facts: dict[str, Any]) -> Iterator[str]:
    for stage in facts["stages"]:
        rank = next(one for one in facts["ranks"] if one["rank"] == stage["rank"])
        yield f"stage {stage['stage']}: collectives of the micro-batches played"
        for (op, group, size), count in _count(rank["collectives"]).most_common():
            yield f"  {count:6d}  {op} in {group} of {size} ranks"
    yield from _compared_lines(facts["compared"])
    yield from (one["whole"] for one in facts["differences"])


def _compared_lines(compared: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not compared:
        yield "no two played ranks share a group: no collectives were compared"
    ranks: dict[str, list[str]] = {}
    for one in compared:
        sign = " to " if one["messages"] else ", "
        name = f"messages in {one['group']}" if one["messages"] else f"{one['group']} of {one['group_size']} ranks"
        ranks.setdefault(name, []).append(sign.join(map(str, one["ranks"])))
    for name, members in ranks.items():
        yield f"compared: {name}, ranks {'; '.join(members)}"


def _count(collectives: Sequence[dict[str, Any]]) -> Counter[tuple[str, str, int]]:
    counts: Counter[tuple[str, str, int]] = Counter()
    for entry in collectives:
        counts[entry["op"], entry["group"], entry["group_size"]] += len(entry["sizes"])
    return counts
