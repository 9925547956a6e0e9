"""How many samples of each dataset a pass over the blend takes, and the order in which a dataset is read."""

from collections.abc import Sequence

import numpy as np

from megatron_vlm.config import BlendEntry, ConfigError


def samples_per_pass(blend: Sequence[BlendEntry], num_samples: Sequence[int], num_images: Sequence[int]) -> np.ndarray:
    """Return how many samples of each entry one pass over the blend takes.

    With `epochs` (or nothing), that many passes over each dataset. With `weight` or `images`, the smallest pass in
    these proportions that contains every sample: the entry that is largest for its proportion is read once, and the
    others are repeated.

    Returns:
        float64[entries]; not rounded, so that several passes together are exact.

    Raises:
        ConfigError: a dataset is empty, or has no images although the proportions are in images.
    """
    available = np.array(num_samples, dtype=np.float64)
    for entry, samples, images in zip(blend, num_samples, num_images, strict=True):
        if samples == 0:
            raise ConfigError(f"blend entry {entry.path} has no usable samples", fix="remove it")
        if entry.images is not None and images == 0:
            raise ConfigError(
                f"blend entry {entry.path} has no images, so its proportion cannot be given in images",
                fix="give all entries a weight instead of images",
            )
    if blend[0].weight is not None:
        proportions = np.array([entry.weight for entry in blend], dtype=np.float64)
    elif blend[0].images is not None:
        proportions = np.array([entry.images for entry in blend], dtype=np.float64) * available / np.array(num_images)
    else:
        return available * np.array([1.0 if entry.epochs is None else entry.epochs for entry in blend])
    return proportions * (available / proportions).max()


def read_in_epochs(num_samples: int, start: int, stop: int, seed: Sequence[int]) -> np.ndarray:
    """Return the samples at [start, stop) of a dataset that is read endlessly and shuffled anew in every epoch.

    Every epoch contains every sample once, wherever the reading is divided into calls.

    Returns:
        int64[stop - start].
    """
    parts = [np.empty(0, dtype=np.int64)]
    for epoch in range(start // num_samples, -(-stop // num_samples)):
        first = epoch * num_samples
        order = order_of_epoch(num_samples, epoch, seed)
        parts.append(order[max(start - first, 0) : max(stop - first, 0)])
    return np.concatenate(parts)


def order_of_epoch(num_samples: int, epoch: int, seed: Sequence[int]) -> np.ndarray:
    """Return the samples of a dataset in the order of one epoch, int64[num_samples]."""
    return np.random.default_rng([*seed, epoch]).permutation(num_samples)
