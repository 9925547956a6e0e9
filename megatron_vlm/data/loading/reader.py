"""Read the samples of a plan under their global ids."""

from collections.abc import Sequence, Set

import numpy as np

from megatron_vlm.data.loading.collate import PlacedSample
from megatron_vlm.data.plan.fragments import take_fragment
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.samples import EncodedSample
from megatron_vlm.data.shards.dataset import ShardedDataset


class SampleReader:
    """Samples of all datasets of the blend, and fragments of them, under their global ids.

    Args:
        datasets: as the plan was built from.
        plan: says what an id means.
        image_tokens: placeholders of an image.
        quarantine: ids of samples that are left out.
        keeps_damaged_images: return samples with a damaged image, too; its `fault` says so.
    """

    def __init__(
        self,
        datasets: Sequence[ShardedDataset],
        plan: Plan,
        image_tokens: ImageTokens,
        quarantine: Set[int] = frozenset(),
        *,
        keeps_damaged_images: bool = False,
    ) -> None:
        self.datasets, self.fragments, self.image_tokens = tuple(datasets), plan.fragments, image_tokens
        self.quarantine, self.keeps_damaged_images = quarantine, keeps_damaged_images
        self._starts = plan.dataset_starts(list(map(len, datasets)))

    def dataset_name(self, sample_id: int) -> str:
        """Return the name of the dataset that a sample is of."""
        return self.datasets[self._find(sample_id)[0]].manifest.dataset_name

    def describe(self, sample_id: int) -> str:
        """Name dataset, shard, sample and, for a fragment, its tokens, in an error message."""
        entry, index, first, last = self._find(sample_id)
        tokens = "" if last is None else f" tokens {first} to {last - 1}"
        return f"{self.datasets[entry].describe(index)}{tokens}"

    def read(self, sample_id: int) -> PlacedSample:
        """Read one sample or fragment; one in quarantine is empty.

        Raises:
            DataError: it is damaged or cannot be read.
        """
        entry, index, first, last = self._find(sample_id)
        if sample_id in self.quarantine:
            return PlacedSample(EncodedSample(()), sample_id, entry, self.describe(sample_id), is_beginning=False)
        sample = self.datasets[entry].read(index, keeps_damaged_images=self.keeps_damaged_images)
        if last is not None:
            sample = take_fragment(sample, first, last, self.image_tokens)
        return PlacedSample(sample, sample_id, entry, self.describe(sample_id), is_beginning=first == 0)

    def _find(self, sample_id: int) -> tuple[int, int, int, int | None]:
        """Return the dataset, index in it, first token and token after the last one; None: to the end."""
        sample, first, last = (sample_id, 0, None) if self.fragments is None else self.fragments.find(sample_id)
        entry = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return entry, int(sample - self._starts[entry]), first, last
