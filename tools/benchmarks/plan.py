"""Planning the paper's blend from index files alone: 25M images interleaved and 25M pairs, 1:1 by images.

    python tools/benchmarks/plan.py --json plan.json            # about 4 GB of disk, deleted at the end
    python tools/benchmarks/plan.py --images 5000000            # a tenth of it

Times are those of the clock. "Restoring" is what a resumed run does: it opens datasets and plan, and a loader at the
middle. No peer plans. With fewer images the time to plan has to be as much shorter.
"""

import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from index_files import write_indexes
from lengths import NUM_IMAGE_TOKENS, documents, pair_texts
from report import Row, describe_versions, parse_arguments, report

from megatron_vlm.config import BlendEntry
from megatron_vlm.data.collate import Collation
from megatron_vlm.data.loader import BatchLoader
from megatron_vlm.data.plan import PlanSettings, build_plan, open_plan
from megatron_vlm.data.shards import ShardedDataset

_ALL_IMAGES = 50_000_000
_MAX_SECONDS, _MAX_GIBIBYTES, _MAX_SECONDS_TO_OPEN, _MAX_STATE_BYTES = 240.0, 8.0, 1.0, 128
_ROUNDS = 3


def open_datasets(settings: PlanSettings) -> list[ShardedDataset]:
    """Open the datasets of the blend."""
    return [ShardedDataset.open(entry.path) for entry in settings.blend]


def restore(settings: PlanSettings, folder: Path, iteration: int) -> BatchLoader:
    """Return a loader that goes on from an iteration."""
    datasets = open_datasets(settings)
    plan = open_plan(settings, datasets, folder)
    collation = Collation(
        seq_length=settings.seq_length,
        num_image_tokens=NUM_IMAGE_TOKENS,
        vocab_size=32000,
        image_token_id=32000,
        pad_token_id=32001,
        image_size=336,
        image_aspect="pad",
        image_mean=(0.5, 0.5, 0.5),
    )
    return BatchLoader(datasets, plan, collation=collation, start_iteration=iteration)


def seconds_of(work) -> float:
    """Return the median seconds on the clock."""
    taken = []
    for _ in range(_ROUNDS):
        started = time.monotonic()
        work()
        taken.append(time.monotonic() - started)
    return float(np.median(taken))


def state_bytes(loader: BatchLoader) -> int:
    """Return the size of what a checkpoint keeps of the position: one integer of fixed size, and the plan's hash."""
    state = {"iteration": f"{loader.iteration:016x}", "plan_hash": loader.plan.hash}
    return len(json.dumps(state).encode())


def measure(num_images: int, folder: Path) -> list[Row]:
    """Build, open and restore."""
    rng = np.random.default_rng(0)
    pairs = pair_texts(num_images // 2, rng)
    write_indexes(folder / "coyo", np.ones(len(pairs), dtype=np.int32), pairs)
    images, text = documents(num_images // 8, rng)
    write_indexes(folder / "mmc4", images, text)
    del images, text, pairs
    settings = PlanSettings(
        blend=tuple(BlendEntry(path=str(folder / name), images=1.0) for name in ("mmc4", "coyo")),
        seq_length=4096,
        num_image_tokens=NUM_IMAGE_TOKENS,
        packing=True,
        overflow="truncate",
        seed=1,
        global_batch_size=1024,
        train_iters=None,
        train_epochs=1.0,
    )
    started = time.monotonic()
    plan = build_plan(settings, open_datasets(settings), folder / "plan")
    seconds = time.monotonic() - started
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    middle = plan.num_iterations // 2
    datasets = open_datasets(settings)
    to_open = seconds_of(lambda: open_plan(settings, datasets, folder / "plan").sample_ids(middle))
    to_restore = seconds_of(lambda: restore(settings, folder / "plan", middle))
    loaders = [restore(settings, folder / "plan", iteration) for iteration in (0, middle, plan.num_iterations)]
    sizes = [state_bytes(loader) for loader in loaders]
    if [loader.iteration for loader in loaders] != [0, middle, plan.num_iterations] or len(set(sizes)) != 1:
        raise SystemExit(f"loaders restored to {[loader.iteration for loader in loaders]}, states of {sizes} bytes")
    work = f"plan of {plan.summary.num_samples} samples with {plan.summary.num_images} images"
    facts = (
        (f"{work}, from index files", "s", seconds, _MAX_SECONDS * num_images / _ALL_IMAGES),
        (f"{work}, peak memory, the writing of the indexes included", "GiB", gibibytes, _MAX_GIBIBYTES),
        ("opening it, and the ids of the middle batch", "s", to_open, _MAX_SECONDS_TO_OPEN),
        ("restoring the position in the middle", "s", to_restore, _MAX_SECONDS_TO_OPEN),
        ("size of the position, the same at the start, the middle and the end", "bytes", sizes[1], _MAX_STATE_BYTES),
    )
    return [
        Row(work=name, unit=unit, ours=ours, required=required, judged="at most")
        for name, unit, ours, required in facts
    ]


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--images", type=int, default=_ALL_IMAGES, help="of both datasets (default: %(default)s)")

    arguments = parse_arguments(__doc__, add)
    folder = Path(tempfile.mkdtemp(prefix="plan_benchmark_"))
    try:
        return report(measure(arguments.images, folder), arguments.json, [describe_versions("numpy")])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
