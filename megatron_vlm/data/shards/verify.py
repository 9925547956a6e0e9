"""Compare every byte of a dataset with its manifest."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_vlm.config import DataError
from megatron_vlm.config.prepare import ImageLimits, ImageRules
from megatron_vlm.data.images.checking import check_image
from megatron_vlm.data.shards.index import (
    MODE_CONTEXT,
    MODE_IMAGE,
    MODE_TRAINED,
    SIZE_DTYPE,
    TOKEN_DTYPE,
    ShardIndex,
    count_sequences,
)
from megatron_vlm.data.shards.manifest import (
    DUPLICATES_NOTE,
    REJECTS_FILE,
    SUFFIXES,
    FileFacts,
    Manifest,
    ShardFacts,
    fault_of_file,
    load_manifest,
)

_MAX_FAULTS_PER_SHARD = 100
_MODES = (MODE_TRAINED, MODE_IMAGE, MODE_CONTEXT)
# Preparation decided which images are wanted; here they only have to be intact.
_ANY_SIZE = ImageLimits(min_side=1, max_aspect_ratio=1e9, max_pixels=1 << 40)


def verify_dataset(folder: Path, *, decode: bool = False) -> Iterator[str]:
    """Yield one line for each fault of a dataset, and nothing if it is intact.

    This checks the size and checksum of every file, the checksum of every sequence, that the index fits the data, the
    range of the token ids, the structure and the size of every image, and that documents = used + rejected. With
    `decode`, every image is also decoded.

    Raises:
        DataError: the folder is not a dataset, or its manifest cannot be read.
    """
    manifest = load_manifest(folder)
    yield from _verify_manifest(folder, manifest)
    total = sum(shard.counts.samples for shard in manifest.shards)
    with tqdm(total=total, unit=" samples", disable=None) as bar:
        for shard in manifest.shards:
            faults = _verify_shard(folder, shard, manifest.tokenizer.vocab_size, decode)
            for number, fault in enumerate(faults):
                if number == _MAX_FAULTS_PER_SHARD:
                    yield f"{shard.name}: more faults follow"
                    break
                yield fault
            bar.update(shard.counts.samples)


def _verify_manifest(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {f"{shard.name}.{suffix}" for shard in manifest.shards for suffix in SUFFIXES}
    present = {path.name for suffix in SUFFIXES for path in folder.glob(f"*.{suffix}")}
    for name in sorted(present - listed):
        yield f"{name}: file is not in the manifest"
    if manifest.rejects_file is not None:
        yield from _verify_file(path := folder / REJECTS_FILE, manifest.rejects_file)
        if path.is_file() and (rows := path.read_bytes().count(b"\n")) != manifest.rejected:
            yield f"{REJECTS_FILE}: {rows} rows, but the manifest says {manifest.rejected}"
    variant = manifest.options.get("recipe", {}).get("variant", "full")
    used = manifest.documents - manifest.rejected
    dropped = manifest.notes.get(DUPLICATES_NOTE, 0)
    if variant == "full" and used != manifest.counts.samples + dropped:
        duplicates = f" and {dropped} duplicates" if dropped else ""
        yield f"manifest: {used} documents were used, but there are {manifest.counts.samples} samples{duplicates}"


def _verify_file(path: Path, facts: FileFacts) -> Iterator[str]:
    if fault := fault_of_file(path, facts):
        yield f"{path.name}: {fault}"


def _verify_shard(folder: Path, shard: ShardFacts, vocab_size: int, decode: bool) -> Iterator[str]:
    faults: list[str] = []
    for suffix in ("idx", "crc", "dim"):
        faults += _verify_file(folder / f"{shard.name}.{suffix}", shard.files[suffix])
    index = None
    if not faults:
        try:
            index = ShardIndex.open(folder / f"{shard.name}.idx")
            faults += _verify_index(shard, index)
        except DataError as error:
            faults.append(f"{shard.name}.idx: {error.what}")
    yield from faults
    path, facts = folder / f"{shard.name}.bin", shard.files["bin"]
    if faults or index is None or not path.is_file() or path.stat().st_size != facts.bytes:
        yield from _verify_file(path, facts)  # without an index, only the file as a whole can be checked
        return
    yield from _verify_data(path, shard, index, vocab_size, decode)


def _verify_index(shard: ShardFacts, index: ShardIndex) -> Iterator[str]:
    name = f"{shard.name}.idx"
    lengths = index.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    if len(lengths) == 0 or lengths.min() <= 0:
        yield f"{name}: a sequence is empty"
    elif not np.array_equal(index.pointers, ends - lengths) or ends[-1] != shard.files["bin"].bytes:
        yield f"{name}: sequences do not fill the data file without gaps"
    if index.borders[0] != 0 or index.borders[-1] != len(lengths) or np.any(np.diff(index.borders) <= 0):
        yield f"{name}: borders of the samples do not ascend from 0 to {len(lengths)}"
    elif not np.isin(index.modes, _MODES).all():
        yield f"{name}: a mode is not one of {_MODES}"
    elif (lengths[index.modes != MODE_IMAGE] % TOKEN_DTYPE.itemsize).any():
        yield f"{name}: a text sequence is not a whole number of tokens long"
    elif shard.files["crc"].bytes != 4 * len(lengths):
        yield f"{shard.name}.crc: {shard.files['crc'].bytes // 4} checksums for {len(lengths)} sequences"
    elif shard.files["dim"].bytes != 4 * (number := int((index.modes == MODE_IMAGE).sum())):
        yield f"{shard.name}.dim: {shard.files['dim'].bytes // 4} sizes for {number} images"
    elif (found := count_sequences(lengths, index.modes, len(index.borders) - 1)) != shard.counts:
        yield f"{name}: holds {found}, but the manifest says {shard.counts}"


def _verify_data(path: Path, shard: ShardFacts, index: ShardIndex, vocab_size: int, decode: bool) -> Iterator[str]:
    crcs = np.fromfile(path.with_suffix(".crc"), dtype="<u4")
    sizes = np.fromfile(path.with_suffix(".dim"), dtype=SIZE_DTYPE).reshape(-1, 2)
    rules = ImageRules(limits=_ANY_SIZE, max_bytes=1 << 40, decode=decode)
    whole = image = 0
    with path.open("rb") as stream:
        for number, (length, mode, crc) in enumerate(zip(index.lengths, index.modes, crcs, strict=True)):
            content = stream.read(int(length))
            whole = zlib.crc32(content, whole)
            fault: str | None
            if zlib.crc32(content) != crc:
                fault = "checksum differs"
            elif mode == MODE_IMAGE:
                fault = _image_fault(content, rules, f"entry {image} of {shard.name}.dim", *sizes[image].tolist())
            else:
                fault = _text_fault(content, vocab_size)
            image += mode == MODE_IMAGE
            if fault:
                sample = int(np.searchsorted(index.borders, number, side="right")) - 1
                yield f"{path.name}: sample {sample}, sequence {number}: {fault}"
    if whole != shard.files["bin"].crc32:
        yield f"{path.name}: checksum differs from the manifest"


def _image_fault(content: bytes, rules: ImageRules, entry: str, width: int, height: int) -> str | None:
    try:
        facts = check_image(content, rules)
    except DataError as error:
        return error.what
    if (facts.width, facts.height) == (width, height):
        return None
    return f"image has {facts.width}x{facts.height} pixels, but {entry} says {width}x{height}"


def _text_fault(content: bytes, vocab_size: int) -> str | None:
    ids = np.frombuffer(content, dtype=TOKEN_DTYPE)
    if 0 <= ids.min() and ids.max() < vocab_size:
        return None
    return f"token ids {ids.min()} to {ids.max()} are outside 0 to {vocab_size - 1}"
