"""docs/shard_format.md is complete: a reader written from it alone, and every reason of a reject is in it."""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import megatron_vlm
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset

DOCUMENT = Path(megatron_vlm.__file__).parents[1] / "docs" / "shard_format.md"
PACKAGE = Path(megatron_vlm.__file__).parent / "data"


def read_shard(folder: Path, shard: dict) -> list[list[tuple[int, bytes]]]:
    """Read a shard by what the document says, and nothing of the package."""
    contents = {}
    for suffix, facts in shard["files"].items():
        contents[suffix] = (folder / f"{shard['name']}.{suffix}").read_bytes()
        assert (len(contents[suffix]), zlib.crc32(contents[suffix])) == (facts["bytes"], facts["crc32"])
    index = contents["idx"]
    magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, code) == (b"MMIDIDX\0\0", 1, 1)
    assert len(index) == 34 + 13 * sequences + 8 * borders
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    first = struct.unpack_from(f"<{borders}q", index, 34 + 12 * sequences)
    modes = struct.unpack_from(f"<{sequences}b", index, 34 + 12 * sequences + 8 * borders)
    crcs = struct.unpack(f"<{sequences}I", contents["crc"])
    assert (offsets[0], first[0], first[-1]) == (0, 0, sequences)
    assert len(contents["dim"]) == 4 * modes.count(1)
    sizes = struct.iter_unpack("<HH", contents["dim"])
    samples = []
    for sample in range(borders - 1):
        samples.append([])
        for number in range(first[sample], first[sample + 1]):
            content = contents["bin"][offsets[number] : offsets[number] + lengths[number]]
            assert zlib.crc32(content) == crcs[number]
            samples[-1].append((modes[number], content))
            if modes[number] == 1:
                assert Image.open(io.BytesIO(content)).size == next(sizes)
    return samples


def read_dataset(folder: Path) -> list[list[tuple[int, bytes]]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("megatron_vlm shards", 1)
    samples = [sample for shard in manifest["shards"] for sample in read_shard(folder, shard)]
    pieces = [piece for sample in samples for piece in sample]
    texts, images = [p for p in pieces if p[0] != 1], [p for p in pieces if p[0] == 1]
    assert manifest["counts"] == {
        "samples": len(samples),
        "sequences": len(pieces),
        "images": len(images),
        "image_bytes": sum(len(content) for _, content in images),
        "text_tokens": sum(len(content) // 4 for _, content in texts),
        "trained_tokens": sum(len(content) // 4 for mode, content in texts if mode == 0),
    }
    return samples


def test_a_reader_of_fifty_lines_written_from_the_document_reads_every_sample(folder, make_samples, tokenizer_facts):
    write_dataset(folder, make_samples(20), dataset_name="tiny", tokenizer=tokenizer_facts, samples_per_shard=8)
    found, dataset = read_dataset(folder), ShardedDataset.open(folder)
    expected = []
    for sample in dataset:
        parts = []
        for segment in sample.segments:
            if isinstance(segment, ImageSegment):
                parts.append((1, segment.encoded))
            else:
                parts.append((0 if segment.train else 2, np.asarray(segment.input_ids, "<i4").tobytes()))
        expected.append(parts)
    assert found == expected
    assert [sum(mode == 1 for mode, _ in sample) for sample in found] == dataset.num_images.tolist()
    tokens = [sum(len(content) // 4 for mode, content in sample if mode != 1) for sample in found]
    assert tokens == dataset.text_lengths.tolist()


def test_every_reason_of_a_reject_is_explained():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r'RejectError\(\s*"(\w+)"', path.read_text()))
    explained = set(re.findall(r"`(\w+)`", DOCUMENT.read_text()))
    assert used - explained == set()
    assert len(used) > 20
