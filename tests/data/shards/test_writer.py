"""The writer takes samples that hold something."""

import numpy as np
import pytest

from megatron_vlm.data.samples import EncodedSample, TextSegment
from megatron_vlm.data.shards.writer import ShardWriter, write_dataset


def test_empty_samples_segments_and_datasets_are_refused(tmp_path, tokenizer_facts):
    writer = ShardWriter(tmp_path / "00000")
    with pytest.raises(ValueError, match="at least one segment"):
        writer.add(EncodedSample(()))
    with pytest.raises(ValueError, match="must not be empty"):
        writer.add(EncodedSample((TextSegment(np.zeros(0, dtype=np.int32), True),)))
    writer.discard()
    with pytest.raises(ValueError, match="at least one sample"):
        write_dataset(tmp_path, [], source="tiny", tokenizer=tokenizer_facts)
