"""How long saves hold up the training loop, and what verification adds to a load; one process, all its cores.

    python tools/benchmarks/checkpoint.py --json checkpoint.json

A decoder of 512 x 8 with 32,000 pieces and a small tower in fp32: weights and Adam's moments, about 0.9 GB. The state
is that of `megatron-vlm train`. Synchronous and asynchronous saves take turns, and the least of each counts. The
asynchronous one is timed from the call to its return; then the benchmark waits for its end, so that no writer disturbs
the next round. The first asynchronous save also allocates the memory for its copy; a note gives its time.

Ratios compare CPU seconds, which other work on the machine changes little; those of a synchronous save leave out that
it also waits for the disk. That of the time by the clock is what a run notices; it means little on a busy machine. The
notes have both times, and how much of what blocks is the copy; the rest describes the tensors.

A load is that of a resume: files are compared with the manifest, then read into model and optimizer. Both read from the
page cache.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import Row, describe_versions, parse_arguments, report

from megatron_vlm.platform.device import prepare_process

prepare_process()

import torch  # noqa: E402
from train_step import SameRows  # noqa: E402

from megatron_vlm.checkpoint import load  # noqa: E402
from megatron_vlm.checkpoint.background import BackgroundSaves  # noqa: E402
from megatron_vlm.checkpoint.manifest import read_manifest  # noqa: E402
from megatron_vlm.checkpoint.save import save_checkpoint  # noqa: E402
from megatron_vlm.checkpoint.sharded_state import load_all  # noqa: E402
from megatron_vlm.config import (  # noqa: E402
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_vlm.config.projectors import make_projector  # noqa: E402
from megatron_vlm.config.towers.clip import Config as ClipConfig  # noqa: E402
from megatron_vlm.parallel.groups import build_groups, rank_layout, single_process  # noqa: E402
from megatron_vlm.training.setup import build_state  # noqa: E402
from megatron_vlm.training.state import TrainState  # noqa: E402

_BLOCKED, _VERIFIED = 0.10, 0.20


def make_state(run_dir: Path, hidden_size: int, num_layers: int) -> TrainState:
    """Return a new run of one rank, whose weights and moments all learn."""
    config = TrainConfig(
        stage="pretrain",
        run_dir=str(run_dir),
        model=ModelConfig(
            language=LanguageConfig(
                vocab_size=32000,
                num_layers=num_layers,
                hidden_size=hidden_size,
                ffn_hidden_size=3 * hidden_size,
                num_attention_heads=8,
            ),
            vision=ClipConfig(
                image_size=224, patch_size=16, num_layers=4, hidden_size=192, ffn_hidden_size=768, num_attention_heads=3
            ),
            projection=make_projector("mlp2x_gelu"),
        ),
        data=DataConfig(tokenizer="unused", blend=(BlendEntry(path="unused"),), seq_length=1024),
        optimizer=OptimizerConfig(lr=1e-4),
        training=TrainingConfig(global_batch_size=1, train_iters=100, precision="fp32"),
        checkpoint=CheckpointConfig(keep_last=1),
    )
    build_groups(config.parallel)
    plan: Any = SameRows([])
    return build_state(config, rank_layout(), plan, ("benchmark",))


class Times:
    """Wall-clock and CPU seconds of calls; the first call does not count."""

    def __init__(self, cpu_clock: Callable[[], float] = time.process_time) -> None:
        self.first: float | None = None
        self._cpu_clock = cpu_clock
        self._taken: list[tuple[float, float]] = []

    def add(self, work: Callable[[], object]) -> None:
        """Call `work` once more."""
        wall, cpu = time.perf_counter(), self._cpu_clock()
        work()
        wall, cpu = time.perf_counter() - wall, self._cpu_clock() - cpu
        if self.first is None:
            self.first = wall
        else:
            self._taken.append((wall, cpu))

    @property
    def wall(self) -> float:
        """Least seconds of a call by the clock."""
        return min(wall for wall, _ in self._taken)

    @property
    def cpu(self) -> float:
        """Least CPU seconds of a call."""
        return min(cpu for _, cpu in self._taken)

    def __str__(self) -> str:
        return f"{self.cpu:.3f} CPU s, {self.wall:.3f} s"


def measure_saves(state: TrainState, rounds: int) -> tuple[Times, Times, Times]:
    """Return the times of synchronous saves, those that asynchronous ones hold up their caller, and of their copies."""
    saves, waited, blocked, copied = BackgroundSaves(), Times(), Times(time.thread_time), Times(time.thread_time)
    copy = saves._staging.copy
    saves._staging.copy = lambda tensors: copied.add(lambda: copy(tensors))  # type: ignore[method-assign]
    for _ in range(rounds + 1):
        state.iteration += 1
        what = (state.config, state.chunks, state.optimizer, state.progress())
        waited.add(lambda what=what: save_checkpoint(*what))  # type: ignore[misc]
        state.iteration += 1
        what = (state.config, state.chunks, state.optimizer, state.progress())
        blocked.add(lambda what=what: saves.start(*what))  # type: ignore[misc]
        saves.wait()
    return waited, blocked, copied


def measure_load(state: TrainState, rounds: int) -> tuple[Times, Times]:
    """Return the times of comparing all files with the manifest, and of reading them into model and optimizer."""
    path = load.checkpoint_path(state.config.run_dir, state.iteration)
    manifest = read_manifest(path)
    verified, read = Times(), Times()
    for _ in range(rounds + 1):
        verified.add(lambda: load._verify_together(path, manifest))
        read.add(lambda: load_all(path, state.chunks, state.optimizer))
    return verified, read


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="after a first one that does not count")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")


def main() -> int:
    """Measure and report."""
    options = parse_arguments(__doc__ or "", _add_options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, single_process():
        state = make_state(Path(folder), options.hidden_size, options.layers)
        waited, blocked, copied = measure_saves(state, options.rounds)
        verified, read = measure_load(state, options.rounds)
        path = load.checkpoint_path(folder, state.iteration)
        size = sum(record.size for record in read_manifest(path).files.values())
    share, verification = blocked.cpu / waited.cpu, verified.cpu / (verified.cpu + read.cpu)
    rows = [
        Row(
            work="asynchronous save blocks",
            unit="of a synchronous one",
            ours=share,
            required=_BLOCKED,
            judged="at most",
        ),
        Row(
            work="the same by the clock",
            unit="of a synchronous one",
            ours=blocked.wall / waited.wall,
            required=_BLOCKED,
            judged="at most",
        ),
        Row(work="verification", unit="of a load", ours=verification, required=_VERIFIED, judged="at most"),
    ]
    notes = [
        f"{size / 1e9:.2f} GB; synchronous {waited}, asynchronous {blocked}, of which the copy {copied}",
        f"the first asynchronous save blocks for {blocked.first:.3f} s",
        f"verification {verified}, reading {read}",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}",
        describe_versions("torch", "megatron-core"),
    ]
    return report(rows, options.json, notes)


if __name__ == "__main__":
    sys.exit(main())
