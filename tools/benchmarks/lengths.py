"""Sample lengths as in the paper's corpora, for the packing and planning benchmarks."""

import numpy as np

NUM_IMAGE_TOKENS = 576


def pair_texts(number: int, rng: np.random.Generator) -> np.ndarray:
    """COYO-like: 22.7 tokens of text on average (paper, Table 2), plus BOS and EOS."""
    text = np.exp(rng.normal(np.log(22.7) - 0.6**2 / 2, 0.6, number))
    return 2 + np.maximum(np.rint(text), 1).astype(np.int32)


def documents(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """MMC4-like: images (4.0 on average, at most 6) and text (122.5 tokens per image) of each document."""
    images = np.clip(rng.poisson(4, number), 1, 6).astype(np.int32)
    text = np.zeros(number)
    for position in range(6):
        stretch = np.exp(rng.normal(np.log(122.5) - 0.5**2 / 2, 0.5, number))
        text += np.where(position < images, stretch, 0)
    return images, 2 + np.rint(text).astype(np.int32)


def pair_lengths(number: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of COYO-like samples, image tokens included."""
    return NUM_IMAGE_TOKENS + pair_texts(number, rng)


def mixed_lengths(number: int, rng: np.random.Generator, seq_length: int) -> np.ndarray:
    """Lengths of both kinds, 1:1 by images, cut to the length of a row."""
    images, text = documents(number // 5, rng)
    lengths = np.concatenate([images * NUM_IMAGE_TOKENS + text, pair_lengths(number - len(images), rng)])
    return np.minimum(rng.permutation(lengths), seq_length)
