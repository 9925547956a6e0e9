"""Training runs: a stage from start to end, and one whose rank is killed in the middle and that is started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import TrainConfig, load_config
from quickstart.curves import Record, read_metrics
from quickstart.processes import CommandError, find_rank, run_command, start_command, watch

DEFAULT_OUTPUT = "runs/quickstart"
"""Folder that the YAML files name; another one is put in its place by overrides."""
_CONFIGS = Path("examples/quickstart")
_SECONDS_TO_DIE = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One `train` command."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """YAML file of the stage."""
        return _CONFIGS / f"{self.name}.yaml"

    @property
    def arguments(self) -> list[str]:
        """What follows `megatron-vlm`."""
        return ["train", str(self.config), *self.overrides, "--nproc-per-node", str(count_processes(self.load()))]

    def load(self) -> TrainConfig:
        """Return the resolved config."""
        return load_config(TrainConfig, self.config, self.overrides)


def count_processes(config: TrainConfig) -> int:
    """Return the ranks of a stage, one replica of the model."""
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def plan_stage(name: str, output: Path, overrides: Sequence[str] = ()) -> Stage:
    """Return a stage that reads and writes under `output`.

    Args:
        name: of the YAML file.
        output: folder of this quickstart run; the default needs no override.
        overrides: further `section.key=value` settings.
    """
    moved: list[str] = []
    if str(output) != DEFAULT_OUTPUT:
        config = load_config(TrainConfig, _CONFIGS / f"{name}.yaml")

        def move(path: str) -> str:
            return path.replace(DEFAULT_OUTPUT, str(output), 1)

        blend = [
            {"path": move(entry.path), **({"images": entry.images} if entry.images else {})}
            for entry in config.data.blend
        ]
        moved = [f"run_dir={move(config.run_dir)}", f"data.tokenizer={move(config.data.tokenizer)}"]
        moved += [f"data.blend={json.dumps(blend)}"]
        if config.checkpoint.load_weights:
            moved += [f"checkpoint.load_weights={move(config.checkpoint.load_weights)}"]
    return Stage(name=name, overrides=(*moved, *overrides))


def product_command(arguments: Sequence[str]) -> list[str]:
    """Return the `megatron-vlm` command with the interpreter that runs this."""
    return [sys.executable, "-m", "megatron_vlm", *arguments]


def train_stage(stage: Stage, log: Path) -> dict[str, Any]:
    """Run a stage to its end; a run folder that holds a checkpoint is resumed.

    Raises:
        CommandError: it failed.
    """
    config = stage.load()
    run_command(product_command(stage.arguments), log, lambda: _describe(config))
    return {"iterations": len(read_metrics(Path(config.run_dir)))}


def train_and_kill(stage: Stage, log: Path, *, kill_after: int, rank: int) -> dict[str, Any]:
    """Run a stage, kill one rank with signal 9 when `kill_after` iterations are done, and run the stage again.

    Returns:
        What the kill did: `rank`, `exit_code` of the launcher, `seconds_to_end`, and `killed`, the records that the run
        had written when it died.

    Raises:
        CommandError: the run ended before the kill, did not end after it, or did not resume.
    """
    config = stage.load()
    run_dir = Path(config.run_dir)
    facts = run_dir.with_name(run_dir.name + "_kill.json")
    if not facts.exists():
        if run_dir.exists():
            shutil.rmtree(run_dir)
        killed = _kill(stage, log, config, kill_after=kill_after, rank=rank)
        facts.write_text(json.dumps(killed))
    run_command(product_command(stage.arguments), log, lambda: _describe(config))
    return json.loads(facts.read_text())


def _kill(stage: Stage, log: Path, config: TrainConfig, *, kill_after: int, rank: int) -> dict[str, Any]:
    run_dir = Path(config.run_dir)

    def done() -> bool:
        return _last_iteration(run_dir) >= kill_after

    with start_command(product_command(stage.arguments), log) as process:
        watch(process, lambda: _describe(config), until=done)
        victim = find_rank(process.pid, rank)
        if victim is None:
            raise CommandError(
                f"{stage.name} ended before iteration {kill_after}, where rank {rank} was to be killed; see {log}"
            )
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        try:
            exit_code = process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            raise CommandError(f"{stage.name} still ran {_SECONDS_TO_DIE:.0f} s after rank {rank} was killed") from None
    return {
        "rank": rank,
        "exit_code": exit_code,
        "seconds_to_end": time.monotonic() - start,
        "killed": read_metrics(run_dir),
    }


def _describe(config: TrainConfig) -> str:
    records = _last_records(Path(config.run_dir))
    if not records:
        return f"{config.stage}: starting {count_processes(config)} processes"
    record = records[-1]
    return (
        f"{config.stage}: iteration {record['iteration']} of {config.training.train_iters}, "
        f"loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s"
    )


def _last_iteration(run_dir: Path) -> int:
    records = _last_records(run_dir)
    return records[-1]["iteration"] if records else 0


def _last_records(run_dir: Path) -> list[Record]:
    """Return the last whole record without reading the file from its start."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        lines = stream.read().split(b"\n")[:-1]
    return [json.loads(lines[-1])] if lines and lines[-1].startswith(b"{") else []
