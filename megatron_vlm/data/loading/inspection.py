"""Say what a global batch of a plan holds, without a model or a training job."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from megatron_vlm.data.loading.collate import Collation, cut_sample
from megatron_vlm.data.loading.reader import SampleReader
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.dataset import ShardedDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSample:
    """A sample, or a fragment of one, in its row of a global batch."""

    row: int
    """Counted within the global batch."""
    sample_id: int
    """As the plan counts."""
    dataset: str
    where: str
    """Dataset, shard and sample; for a fragment, its tokens."""
    sample: EncodedSample
    """As it stands in the row: what does not fit is cut off."""
    num_tokens: int
    """Positions that it takes, those of its images included."""
    num_labels: int
    """Tokens that have a loss."""
    is_left_out: bool
    """Whether it is in quarantine, and therefore empty."""

    @property
    def images(self) -> list[ImageSegment]:
        """Its images, in reading order."""
        return [segment for segment in self.sample.segments if isinstance(segment, ImageSegment)]


def read_batch(
    datasets: Sequence[ShardedDataset],
    plan: Plan,
    iteration: int,
    collation: Collation,
    quarantine: Set[int] = frozenset(),
) -> Iterator[BatchSample]:
    """Yield the samples of a global batch, row by row.

    Args:
        datasets: one per entry of the blend, as the plan was built from.
        plan: rows of samples.
        iteration: counted from 0.
        collation: sizes of the model.
        quarantine: ids of samples that are left out.

    Raises:
        DataError: the text of a sample is damaged, or a sample cannot be read. Damaged images are returned.
        IndexError: the plan has no such iteration.
    """
    reader = SampleReader(datasets, plan, collation.image_tokens, quarantine, keeps_damaged_images=True)
    sample_ids, samples_per_row = plan.rows(iteration)
    remaining = iter(sample_ids.tolist())
    for row, count in enumerate(samples_per_row.tolist()):
        for _ in range(count):
            placed = reader.read(next(remaining))
            sample = cut_sample(
                placed.sample, plan.seq_length(iteration), collation.image_tokens, collation.max_images_per_row
            )
            yield BatchSample(
                row=row,
                sample_id=placed.sample_id,
                dataset=datasets[placed.dataset].manifest.dataset_name,
                where=placed.where,
                sample=sample,
                num_tokens=sum(map(collation.image_tokens.of_segment, sample.segments)),
                num_labels=_count_labels(sample),
                is_left_out=placed.sample_id in quarantine,
            )


def _count_labels(sample: EncodedSample) -> int:
    """Count the tokens that have a loss: the first one of a sample has no predecessor."""
    counted = sum(len(part.input_ids) for part in sample.segments if isinstance(part, TextSegment) and part.train)
    first = sample.segments[0] if sample.segments else None
    return counted - (isinstance(first, TextSegment) and first.train)
