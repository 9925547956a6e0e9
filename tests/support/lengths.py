"""Datasets of which only the lengths exist, for tests of planning."""

import dataclasses

import numpy as np

from megatron_vlm.config import BlendEntry
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import Outlines

IMAGE_TOKENS = 16


class Lengths:
    """All text of a sample comes first, then all its images, of random sizes.

    As if images had a loss, too, every fragment has something to train.
    """

    def __init__(self, num_images, text_lengths) -> None:
        self.num_images = np.array(num_images, dtype=np.int32)
        self.text_lengths = np.array(text_lengths, dtype=np.int32)
        self.sizes = np.random.default_rng(len(self)).integers(1, 9, (self.num_images.sum(), 2)).astype(np.uint16)
        self.fingerprint = f"{self.num_images.tolist()} {self.text_lengths.tolist()}"

    def __len__(self) -> int:
        return len(self.num_images)

    def outlines(self, samples):
        parts = [[int(self.text_lengths[sample])] + [0] * int(self.num_images[sample]) for sample in samples]
        tokens = np.array(sum(parts, []))
        return Outlines(np.cumsum([0, *map(len, parts)]), tokens == 0, np.ones(len(tokens), dtype=bool), tokens)

    def image_sizes(self, samples=None):
        owner = np.repeat(np.arange(len(self)), self.num_images)
        return self.sizes if samples is None else self.sizes[np.isin(owner, samples)]


class Questions(Lengths):
    """A question without a loss, then the images, then the answer.

    Args:
        questions: tokens of each.
        num_images: of each sample.
        answers: tokens of each.
    """

    def __init__(self, questions, num_images, answers) -> None:
        super().__init__(num_images, np.array(questions) + np.array(answers))
        self.questions, self.answers = questions, answers

    def outlines(self, samples):
        tokens, trained, sizes = [], [], [0]
        for sample in samples:
            images = [0] * int(self.num_images[sample])
            tokens += [self.questions[sample], *images, self.answers[sample]]
            trained += [False, *(False for _ in images), True]
            sizes.append(2 + len(images))
        return Outlines(np.cumsum(sizes), np.array(tokens) == 0, np.array(trained), np.array(tokens))


def make_dataset(number: int, seed: int = 0) -> Lengths:
    """Return samples of 0 to 3 images and 1 to 39 tokens of text."""
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(0, 4, number), rng.integers(1, 40, number))


def make_settings(**changes) -> PlanSettings:
    """Return settings of one epoch of two datasets in rows of 128 tokens."""
    base = PlanSettings(
        blend=(BlendEntry(path="a"), BlendEntry(path="b")),
        seq_length=128,
        image_tokens=ImageTokens(IMAGE_TOKENS),
        packing=True,
        overflow="fail",
        seed=3,
        global_batch_size=8,
        train_iters=None,
        train_epochs=1.0,
    )
    return dataclasses.replace(base, **changes)


def lengths_of(datasets) -> np.ndarray:
    """Return the tokens of every sample."""
    return np.concatenate([dataset.num_images * IMAGE_TOKENS + dataset.text_lengths for dataset in datasets])
