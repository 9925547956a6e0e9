"""Opening a dataset of a million documents and reading samples at random, in fresh processes.

    python tools/benchmarks/open.py --json open.json

Memory is the growth of the resident set, including mapped files, during opening and during the reads. Peer:
megatron-core's IndexedDataset on the same files, one per shard.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from index_files import write_indexes
from lengths import documents
from report import Row, describe_versions, parse_arguments, report

_MAX_MILLISECONDS, _MAX_MEGABYTES_TO_OPEN, _MAX_MEGABYTES_TO_READ = 10.0, 1.0, 4.0
_PEER = "IndexedDataset"


def measure_ours(folder: Path, num_reads: int) -> dict[str, float]:
    """Open and read in this process."""
    from megatron_vlm.data.shards.dataset import ShardedDataset

    before, started = _resident(), time.perf_counter()
    dataset = ShardedDataset.open(folder)
    milliseconds, opened = (time.perf_counter() - started) * 1e3, _resident()
    for sample in np.random.default_rng(1).integers(len(dataset), size=num_reads):
        dataset[sample]
    return {"milliseconds": milliseconds, "open": opened - before, "read": _resident() - opened}


def measure_peer(folder: Path, num_reads: int) -> dict[str, float]:
    """Do the same with megatron-core."""
    from megatron_vlm.platform.device import prepare_process

    prepare_process()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    before, started = _resident(), time.perf_counter()
    shards = [IndexedDataset(prefix, multimodal=True) for prefix in prefixes]
    milliseconds, opened = (time.perf_counter() - started) * 1e3, _resident()
    sizes = [len(shard.document_indices) - 1 for shard in shards]
    for sample in np.random.default_rng(1).integers(sum(sizes), size=num_reads):
        shard, document = divmod(int(sample), sizes[0])
        first, last = shards[shard].document_indices[document : document + 2]
        for sequence in range(first, last):
            content, _ = shards[shard][sequence]
            content.tobytes()  # nothing is read before this
    return {"milliseconds": milliseconds, "open": opened - before, "read": _resident() - opened}


def _resident() -> float:
    return psutil.Process().memory_info().rss / 1e6


def run_in_processes(who: str, folder: Path, num_reads: int, rounds: int) -> dict[str, float]:
    """Return the medians over fresh processes."""
    command = [sys.executable, __file__, "--in-this-process", who, "--folder", str(folder), "--reads", str(num_reads)]
    found = []
    for _ in range(rounds):
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {name: float(np.median([one[name] for one in found])) for name in found[0]}


def measure(folder: Path, num_documents: int, num_reads: int, rounds: int) -> list[Row]:
    """Compare both on one dataset."""
    images, text = documents(num_documents, np.random.default_rng(0))
    write_indexes(folder / "mmc4", images, text, readable=True)
    ours, peer = (run_in_processes(who, folder / "mmc4", num_reads, rounds) for who in ("ours", "peer"))
    work = f"opening {num_documents} documents"
    facts = (
        (work, "ms", "milliseconds", _MAX_MILLISECONDS),
        (f"{work}, memory", "MB", "open", _MAX_MEGABYTES_TO_OPEN),
        (f"{num_reads} random reads, growth of memory", "MB", "read", _MAX_MEGABYTES_TO_READ),
    )
    return [
        Row(work=name, unit=unit, ours=ours[key], peers={_PEER: peer[key]}, required=required, judged="at most")
        for name, unit, key, required in facts
    ]


def main() -> int:
    """Run the benchmark, or one measurement in this process."""

    def add(parser):
        parser.add_argument("--documents", type=int, default=1_000_000, help="default: %(default)s")
        parser.add_argument("--reads", type=int, default=50_000, help="random reads (default: %(default)s)")
        parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each (default: %(default)s)")
        parser.add_argument("--in-this-process", choices=("ours", "peer"), help="measure only this one, on --folder")
        parser.add_argument("--folder", type=Path, help="folder of a dataset")

    arguments = parse_arguments(__doc__, add)
    if arguments.in_this_process:
        function = measure_ours if arguments.in_this_process == "ours" else measure_peer
        sys.stdout.write(json.dumps(function(arguments.folder, arguments.reads)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="open_benchmark_"))
    try:
        rows = measure(folder, arguments.documents, arguments.reads, arguments.rounds)
        return report(rows, arguments.json, [describe_versions("megatron-core", "numpy", "psutil")])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
