"""Statistics of a dataset: the numbers of Table 2 in the paper, and histograms."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.platform.charts import draw_bars, save_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counts and means of a dataset."""

    dataset_name: str
    samples: int
    images: int
    text_tokens: int
    trained_tokens: int
    image_bytes: int
    documents: int
    rejected: int
    images_per_sample: float | None
    """None if there are no samples, for example because every document was rejected."""
    text_tokens_per_sample: float | None
    text_tokens_per_image: float | None
    """None if there are no images."""
    images_histogram: dict[int, int]
    """Samples by number of images."""
    text_tokens_histogram: dict[int, int]
    """Samples by number of text tokens; the key is the lower bound of a bin, a power of two or 0."""


def compute_statistics(dataset: ShardedDataset) -> Statistics:
    """Collect what the index files and the manifest say, without reading images or text."""
    counts, manifest = dataset.manifest.counts, dataset.manifest
    lengths = dataset.text_lengths
    classes = np.where(lengths > 0, 1 << np.log2(np.maximum(lengths, 1)).astype(np.int64), 0)
    return Statistics(
        dataset_name=manifest.dataset_name,
        samples=counts.samples,
        images=counts.images,
        text_tokens=counts.text_tokens,
        trained_tokens=counts.trained_tokens,
        image_bytes=counts.image_bytes,
        documents=manifest.documents,
        rejected=manifest.rejected,
        images_per_sample=counts.images / counts.samples if counts.samples else None,
        text_tokens_per_sample=counts.text_tokens / counts.samples if counts.samples else None,
        text_tokens_per_image=counts.text_tokens / counts.images if counts.images else None,
        images_histogram=_count_values(dataset.num_images),
        text_tokens_histogram=_count_values(classes),
    )


def format_statistics(statistics: Statistics) -> str:
    """Return the statistics as lines of text, beginning with the numbers of Table 2 in the paper."""
    rows = {
        "dataset": statistics.dataset_name,
        "images per sample": _rounded(statistics.images_per_sample, 2),
        "text tokens per image": _rounded(statistics.text_tokens_per_image, 1),
        "text tokens per sample": _rounded(statistics.text_tokens_per_sample, 1),
    }
    for name in ("samples", "images", "text_tokens", "trained_tokens", "image_bytes", "documents", "rejected"):
        rows[name.replace("_", " ")] = getattr(statistics, name)
    rows["samples by images"] = _listed(statistics.images_histogram)
    rows["samples by text tokens from"] = _listed(statistics.text_tokens_histogram)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def save_histograms(statistics: Statistics, folder: Path) -> list[Path]:
    """Draw the histograms as `images_per_sample.png` and `text_tokens_per_sample.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, title, bars in (
        ("images_per_sample", "samples by number of images", statistics.images_histogram),
        ("text_tokens_per_sample", "samples by text tokens (from, per bin)", statistics.text_tokens_histogram),
    ):
        chart = draw_bars(f"{statistics.dataset_name}: {title}", list(map(str, bars)), {"samples": list(bars.values())})
        save_png(chart, path := folder / f"{name}.png")
        drawn.append(path)
    return drawn


def _rounded(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count_values(values: np.ndarray) -> dict[int, int]:
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def _listed(histogram: dict[int, int]) -> str:
    return ", ".join(f"{value}: {count}" for value, count in histogram.items())
