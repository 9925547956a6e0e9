"""The index is one of megatron-core's, and nothing else is taken for one."""

import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.index import ShardIndex
from megatron_vlm.data.shards.writer import write_dataset


@pytest.fixture
def dataset(folder, make_samples, tokenizer_facts):
    write_dataset(folder, make_samples(25), dataset_name="tiny", tokenizer=tokenizer_facts, samples_per_shard=10)
    return ShardedDataset.open(folder)


def test_megatron_core_alone_reads_the_shard(dataset):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    shard = indexed_dataset.IndexedDataset(str(dataset.folder / "00001"), multimodal=True)
    borders = shard.document_indices
    assert len(borders) - 1 == 10
    for number in range(10):
        sample = dataset[10 + number]
        for position, segment in enumerate(sample.segments):
            content, mode = shard[int(borders[number]) + position]
            if isinstance(segment, ImageSegment):
                assert (content.tobytes(), mode) == (segment.encoded, 1)
            else:
                assert content.tobytes() == segment.input_ids.astype("<i4").tobytes()
                assert mode == (0 if segment.train else 2)


def test_index_of_another_kind_is_refused(dataset):
    path = dataset.folder / "00000.idx"
    path.write_bytes(b"NOTANIDX" * 20)
    with pytest.raises(DataError, match="not the index of a shard"):
        ShardIndex.open(path)
    path.write_bytes(b"MM")
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.open(path)
