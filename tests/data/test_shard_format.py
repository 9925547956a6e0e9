"""docs/shard_format.md is complete: a reader written from it alone, and every reason of a reject is in it."""

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np

import megatron_vlm
from megatron_vlm.data.shards import ImageSegment, ShardedDataset, write_dataset

DOCUMENT = Path(megatron_vlm.__file__).parents[1] / "docs" / "shard_format.md"
PACKAGE = Path(megatron_vlm.__file__).parent / "data"


def test_a_reader_of_thirty_lines_written_from_the_document_reads_every_sample(folder, make_samples, tokenizer_facts):
    write_dataset(folder, make_samples(20), source="tiny", tokenizer=tokenizer_facts, samples_per_shard=8)
    found = []
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        index, data, crcs = ((folder / f"{shard['name']}.{suffix}").read_bytes() for suffix in ("idx", "bin", "crc"))
        assert index[:9] == b"MMIDIDX\0\0"
        version, code, sequences, borders = struct.unpack_from("<QBQQ", index, 9)
        assert (version, code) == (1, 1)
        lengths = struct.unpack_from(f"<{sequences}i", index, 34)
        offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
        first = struct.unpack_from(f"<{borders}q", index, 34 + 12 * sequences)
        modes = struct.unpack_from(f"<{sequences}b", index, 34 + 12 * sequences + 8 * borders)
        assert len(index) == 34 + 13 * sequences + 8 * borders
        for sample in range(borders - 1):
            parts = []
            for number in range(first[sample], first[sample + 1]):
                content = data[offsets[number] : offsets[number] + lengths[number]]
                assert zlib.crc32(content) == struct.unpack_from("<I", crcs, 4 * number)[0]
                parts.append((modes[number], content))
            found.append(parts)
    expected = []
    for sample in ShardedDataset.open(folder):
        parts = []
        for segment in sample.segments:
            if isinstance(segment, ImageSegment):
                parts.append((1, segment.encoded))
            else:
                parts.append((0 if segment.train else 2, np.asarray(segment.input_ids, "<i4").tobytes()))
        expected.append(parts)
    assert found == expected


def test_every_reason_of_a_reject_is_explained():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r'RejectError\(\s*"(\w+)"', path.read_text()))
    explained = set(re.findall(r"`(\w+)`", DOCUMENT.read_text()))
    assert used - explained == set()
    assert len(used) > 20
