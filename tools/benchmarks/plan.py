"""Planning the paper's blend from index files alone: 25M images interleaved and 25M pairs, 1:1 by images.

python tools/benchmarks/plan.py --json plan.json            # about 4 GB of disk, deleted at the end
python tools/benchmarks/plan.py --images 5000000            # a tenth of it
"""

import resource
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from lengths import NUM_IMAGE_TOKENS, documents, pair_texts
from report import Result, parse_arguments, report

from megatron_vlm.config import BlendEntry
from megatron_vlm.data.manifest import Counts, FileFacts, Manifest, ShardFacts, TokenizerFacts, save_manifest
from megatron_vlm.data.plan import PlanSettings, build_plan, open_plan
from megatron_vlm.data.shards import MODE_IMAGE, MODE_TRAINED, ShardedDataset

_SAMPLES_PER_SHARD = 100_000
_MAX_SECONDS, _MAX_GIBIBYTES, _MAX_SECONDS_TO_OPEN = 240.0, 8.0, 1.0
_TOKENIZER = TokenizerFacts(name="none", sha256="0" * 64, vocab_size=32000, bos_id=1, eos_id=2)


def write_shard(folder: Path, name: str, images: np.ndarray, text: np.ndarray) -> ShardFacts:
    """Write the index of a shard by docs/shard_format.md; data and checksums are holes of the right size.

    Each sample is a text of one token, then its images, each followed by a part of the text.
    """
    sequences = 1 + 2 * images.astype(np.int64)
    borders = np.concatenate([[0], np.cumsum(sequences)])
    place = np.arange(borders[-1]) - np.repeat(borders[:-1], sequences)
    is_image = place % 2 == 1
    part = np.repeat(np.maximum((text - 1) // images, 1), sequences)
    tokens = np.where(place == 0, 1, np.where(place == np.repeat(sequences - 1, sequences), 0, part))
    used = np.add.reduceat(np.where(is_image, 0, tokens), borders[:-1])
    tokens[borders[1:] - 1] = np.maximum(text - used, 1)
    lengths = np.where(is_image, 30_000, tokens * 4).astype("<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x01"
    header += np.array([len(lengths), len(borders)], "<u8").tobytes()
    modes = np.where(is_image, MODE_IMAGE, MODE_TRAINED).astype("<i1")
    index = header + b"".join(array.tobytes() for array in (lengths, pointers, borders.astype("<i8"), modes))
    (folder / f"{name}.idx").write_bytes(index)
    sizes = {"bin": int(lengths.sum(dtype=np.int64)), "crc": 4 * len(lengths)}
    for suffix, size in sizes.items():
        with (folder / f"{name}.{suffix}").open("wb") as stream:
            stream.truncate(size)
    files = {suffix: FileFacts(bytes=size, crc32=0) for suffix, size in sizes.items()}
    files["idx"] = FileFacts(bytes=len(index), crc32=zlib.crc32(index))
    counts = Counts(samples=len(images), sequences=len(lengths), images=int(images.sum()))
    return ShardFacts(name=name, input=name, counts=counts, files=files)


def write_indexes(folder: Path, images: np.ndarray, text: np.ndarray) -> ShardedDataset:
    """Write a dataset that can be planned, though not read."""
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(images), _SAMPLES_PER_SHARD)):
        part = slice(first, first + _SAMPLES_PER_SHARD)
        shards.append(write_shard(folder, f"{number:05d}", images[part], text[part]))
    save_manifest(
        Manifest(source=folder.name, tokenizer=_TOKENIZER, shards=tuple(shards), documents=len(images)), folder
    )
    return ShardedDataset.open(folder)


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--images", type=int, default=50_000_000, help="of both datasets together")

    arguments = parse_arguments(__doc__, add)
    folder = Path(tempfile.mkdtemp(prefix="plan_benchmark_"))
    try:
        return report(_measure(arguments.images, folder), arguments.json)
    finally:
        shutil.rmtree(folder)


def _measure(num_images: int, folder: Path) -> list[Result]:
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
    datasets = [ShardedDataset.open(entry.path) for entry in settings.blend]
    plan = build_plan(settings, datasets, folder / "plan")
    seconds = time.monotonic() - started
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.monotonic()
    open_plan(settings, datasets, folder / "plan").sample_ids(plan.num_iterations // 2)
    seconds_to_open = time.monotonic() - started
    summary = plan.summary
    work = f"plan of {summary.num_samples} samples with {summary.num_images} images"
    scale = num_images / 50_000_000
    return [
        Result(
            work=work,
            unit=f"s, peak {gibibytes:.2f} GiB (the writing of the indexes included)",
            ours=seconds,
            peers={},
            ratio=None,
            required=f"<= {_MAX_SECONDS * scale:g} s, <= {_MAX_GIBIBYTES:g} GiB",
            met=seconds <= _MAX_SECONDS * scale and gibibytes <= _MAX_GIBIBYTES,
        ),
        Result(
            work="opening it and finding the middle",
            unit="s",
            ours=seconds_to_open,
            peers={},
            ratio=None,
            required=f"<= {_MAX_SECONDS_TO_OPEN:g} s",
            met=seconds_to_open <= _MAX_SECONDS_TO_OPEN,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
