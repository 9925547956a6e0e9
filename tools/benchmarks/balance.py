"""Balance of the paper's blend over data-parallel ranks, simulated from the plan, against its rows in random order.

python tools/benchmarks/balance.py --json balance.json

Each figure is the load of the fullest rank, summed over all global batches, divided by the mean load of the ranks: how
much longer a run takes because ranks wait for each other.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
from lengths import NUM_IMAGE_TOKENS, documents, pair_texts
from report import Row, parse_arguments, report

from megatron_vlm.config import BlendEntry
from megatron_vlm.data.plan.balance_report import report_balance
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import plan_rows
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import Outlines

_GLOBAL_BATCH_SIZE = 1024
# Upper bounds by data-parallel size. With 512 ranks of 2 rows each, single large rows decide.
_REQUIRED = {
    8: {"images": 1.002, "attention work": 1.005},
    64: {"images": 1.01, "attention work": 1.03},
    512: {"images": 1.03, "attention work": 1.33},
}


@dataclass
class Lengths:
    """A dataset that consists only of lengths: a text, then its images."""

    num_images: np.ndarray
    text_lengths: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.num_images)

    def outlines(self, samples: np.ndarray) -> Outlines:
        """Return the segments of samples: the text first."""
        sizes = 1 + self.num_images[samples].astype(np.int64)
        borders = np.concatenate([[0], np.cumsum(sizes)])
        tokens = np.zeros(borders[-1], dtype=np.int32)
        tokens[borders[:-1]] = self.text_lengths[samples]
        return Outlines(borders, tokens == 0, tokens > 0, tokens)


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument(
            "--images", type=int, default=4_000_000, help="in both datasets together (default: %(default)s)"
        )

        parser.add_argument("--max-images-per-row", type=int, help="data.max_images_per_row (default: none)")
        parser.add_argument("--seq-length", type=int, default=4096, help="data.seq_length (default: %(default)s)")

    arguments = parse_arguments(__doc__, add)
    rng = np.random.default_rng(0)
    images, text = documents(arguments.images // 8, rng)
    pairs = pair_texts(arguments.images // 2, rng)
    datasets = [Lengths(images, text, "mmc4"), Lengths(np.ones(len(pairs), dtype=np.int32), pairs, "coyo")]
    settings = PlanSettings(
        blend=tuple(BlendEntry(path=dataset.fingerprint, images=1.0) for dataset in datasets),
        seq_length=arguments.seq_length,
        image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
        packing=True,
        overflow="truncate",
        seed=1,
        global_batch_size=_GLOBAL_BATCH_SIZE,
        train_iters=None,
        train_epochs=1.0,
        max_images_per_row=arguments.max_images_per_row,
    )
    started = time.process_time()
    rows = plan_rows(settings, datasets)
    seconds = time.process_time() - started
    found = report_balance(settings, rows, list(_REQUIRED))
    results = [
        Row(
            work=f"{balance.load}, {balance.data_parallel_size} data-parallel ranks",
            unit="fullest rank over the mean",
            ours=balance.planned,
            required=_REQUIRED[balance.data_parallel_size][balance.load],
            judged="at most",
            peers={"random order": balance.random},
        )
        for balance in found
    ]
    notes = [
        f"{rows.summary.num_rows} rows of {settings.seq_length} in global batches of {_GLOBAL_BATCH_SIZE}, "
        f"utilisation {rows.summary.utilisation:.4f}; planned in {seconds:.1f} s of CPU time"
    ]
    notes += [
        f"{balance.load}, {balance.data_parallel_size} ranks: no order can go below {balance.lower_bound:.4f}; "
        f"the worst batch has {balance.worst:.3f}, in random order {balance.random_worst:.3f}"
        for balance in found
    ]
    return report(results, arguments.json, notes)


if __name__ == "__main__":
    sys.exit(main())
