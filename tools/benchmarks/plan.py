"""Planning the paper's blend from index files only: images from documents and pairs, 1:1.

    python tools/benchmarks/plan.py --json plan.json            # needs 6 GB of disk, freed at the end
    python tools/benchmarks/plan.py --images 5000000            # a tenth of the smaller plan, a sixteenth of the larger

Two plans: one of 25M images in documents and 25M pairs, and a larger one with 50M samples. Times are wall-clock times.
"Restoring" does what a resumed run does: it reads the manifest of a checkpoint and opens datasets, plan, and a loader
at that iteration. The state is this manifest as the trainer writes it, without the list of tensor files. No peer makes
a plan. With fewer images, the time allowed for planning shrinks in proportion. Both plans are made again with
`data.max_images_per_row` of one image less than the tokens of a row allow.
"""

import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from index_files import write_indexes
from lengths import NUM_IMAGE_TOKENS, documents, pair_texts
from report import Row, describe_versions, parse_arguments, report

from megatron_vlm.config import BlendEntry, TrainConfig, load_config
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import Plan, build_plan, open_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.shards.dataset import ShardedDataset

_ALL_IMAGES, _IMAGES_OF_ALL_SAMPLES = 50_000_000, 79_000_000
_MAX_SECONDS, _MAX_GIBIBYTES, _MAX_SECONDS_TO_OPEN = 240.0, 8.0, 1.0
# The state may grow only by decimal digits of the iteration and the samples seen.
_MAX_STATE_BYTES, _MAX_STATE_GROWTH = 512, 16
_MAX_IMAGES_PER_ROW, _MAX_RATIO = 6, 1.3
_CONFIG = Path(__file__).parents[2] / "examples" / "vila_7b" / "pretrain.yaml"
_ROUNDS = 3


def open_datasets(settings: PlanSettings) -> list[ShardedDataset]:
    """Open the datasets of the blend."""
    return [ShardedDataset.open(entry.path) for entry in settings.blend]


def restore(settings: PlanSettings, folder: Path, iteration: int) -> BatchLoader:
    """Return a loader that continues after an iteration."""
    datasets = open_datasets(settings)
    plan = open_plan(settings, datasets, folder)
    collation = Collation(
        seq_length=settings.seq_length,
        image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
        vocab_size=32000,
        image_token_id=32000,
        pad_token_id=32001,
        image_size=336,
        image_aspect="pad",
        image_mean=(0.5, 0.5, 0.5),
    )
    return BatchLoader(datasets, plan, collation=collation, start_iteration=iteration)


def seconds_of(work) -> float:
    """Return the median wall-clock seconds."""
    taken = []
    for _ in range(_ROUNDS):
        started = time.monotonic()
        work()
        taken.append(time.monotonic() - started)
    return float(np.median(taken))


def save_state(plan: Plan, iteration: int, folder: Path) -> int:
    """Write the state that a checkpoint holds apart from tensors, and return its size in bytes."""
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    from megatron_vlm.checkpoint.manifest import Manifest, write_manifest
    from megatron_vlm.training.state import TrainState

    samples = plan.summary.num_samples * iteration // plan.num_iterations
    nothing: Any = None  # the position does not depend on these
    state = TrainState(
        config=load_config(TrainConfig, _CONFIG),
        layout=nothing,
        objective=nothing,
        rank=nothing,
        chunks=(),
        wrapped=(),
        optimizer=nothing,
        plan=plan,
        iteration=iteration,
        consumed_samples=samples,
    )
    folder.mkdir(exist_ok=True)
    write_manifest(folder, Manifest(iteration=iteration, progress=state.progress(), files={}))
    return sum(path.stat().st_size for path in folder.iterdir())


def restore_state(settings: PlanSettings, folder: Path, checkpoint: Path) -> BatchLoader:
    """Return a loader that continues from a checkpoint."""
    from megatron_vlm.checkpoint.manifest import read_manifest

    return restore(settings, folder, read_manifest(checkpoint).progress["iteration"])


def write_datasets(num_images: int, folder: Path) -> PlanSettings:
    """Write the indexes and return the settings of the plan."""
    rng = np.random.default_rng(0)
    pairs = pair_texts(num_images // 2, rng)
    write_indexes(folder / "coyo", np.ones(len(pairs), dtype=np.int32), pairs)
    images, text = documents(num_images // 8, rng)
    write_indexes(folder / "mmc4", images, text)
    return PlanSettings(
        blend=tuple(BlendEntry(path=str(folder / name), images=1.0) for name in ("mmc4", "coyo")),
        seq_length=4096,
        image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
        packing=True,
        overflow="truncate",
        seed=1,
        global_batch_size=1024,
        train_iters=None,
        train_epochs=1.0,
    )


def make_plan(settings: PlanSettings, folder: Path) -> tuple[Plan, float]:
    """Return a plan of all samples and the seconds that it took."""
    started = time.monotonic()
    return build_plan(settings, open_datasets(settings), folder), time.monotonic() - started


def measure(num_images: int, most_images: int, folder: Path) -> list[Row]:
    """Build, open and restore a plan of `num_images`; the time allowed is for `most_images`."""
    settings = write_datasets(num_images, folder)
    plan, seconds = make_plan(settings, folder / "plan")
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    middle = plan.num_iterations // 2
    datasets = open_datasets(settings)
    to_open = seconds_of(lambda: open_plan(settings, datasets, folder / "plan").sample_ids(middle))
    iterations = (0, middle, plan.num_iterations)
    saved = [folder / str(iteration) for iteration in iterations]
    sizes = [save_state(plan, *place) for place in zip(iterations, saved, strict=True)]
    to_restore = seconds_of(lambda: restore_state(settings, folder / "plan", saved[1]))
    found = tuple(restore_state(settings, folder / "plan", path).iteration for path in saved)
    if found != iterations:
        raise SystemExit(f"states of the iterations {iterations} restore {found}")
    _, budgeted = make_plan(replace(settings, max_images_per_row=_MAX_IMAGES_PER_ROW), folder / "plan_images")
    budget = f"data.max_images_per_row={_MAX_IMAGES_PER_ROW}"
    work = f"plan of {plan.summary.num_samples} samples with {plan.summary.num_images} images"
    facts = (
        (f"{work}, from index files", "s", seconds, _MAX_SECONDS * num_images / most_images),
        (f"time of the {work}, with {budget} over without it", "x", budgeted / seconds, _MAX_RATIO),
        (f"{work}, peak memory, including the writing of the indexes", "GiB", gibibytes, _MAX_GIBIBYTES),
        (f"opening the {work} and reading the ids of the middle batch", "s", to_open, _MAX_SECONDS_TO_OPEN),
        (f"restoring the middle of the {work}", "s", to_restore, _MAX_SECONDS_TO_OPEN),
        (f"state at the middle of the {work}", "bytes", sizes[1], _MAX_STATE_BYTES),
        (f"growth of the state of the {work}, start to end", "bytes", max(sizes) - min(sizes), _MAX_STATE_GROWTH),
    )
    return [
        Row(work=name, unit=unit, ours=ours, required=required, judged="at most")
        for name, unit, ours, required in facts
    ]


def measure_in_process(num_images: int, most_images: int, folder: Path) -> list[Row]:
    """Measure in a separate process, so that its peak memory comes from this plan only."""
    folder.mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, num_images, most_images, folder).result()
        finally:
            shutil.rmtree(folder)


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        text = f"in the smaller plan; the larger has {_IMAGES_OF_ALL_SAMPLES / _ALL_IMAGES} times as many"
        parser.add_argument("--images", type=int, default=_ALL_IMAGES, help=f"{text} (default: %(default)s)")

    arguments = parse_arguments(__doc__, add)
    folder = Path(tempfile.mkdtemp(prefix="plan_benchmark_"))
    try:
        rows = []
        for most_images in (_ALL_IMAGES, _IMAGES_OF_ALL_SAMPLES):
            num_images = arguments.images * most_images // _ALL_IMAGES
            rows += measure_in_process(num_images, most_images, folder / str(most_images))
        return report(rows, arguments.json, [describe_versions("numpy")])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
