import tracemalloc

import numpy as np
import pytest

from megatron_vlm.config import DataError
from megatron_vlm.data.prepare.duplicates import (
    FINGERPRINTS_FILE,
    ORIGINS_FILE,
    RECORD,
    Fingerprints,
    FingerprintWriter,
    find_repeats,
    fingerprint,
    join_fingerprints,
)
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment


def text(*ids: int, train: bool = True) -> TextSegment:
    return TextSegment(np.array(ids, dtype=np.int32), train)


def sample(*segments) -> EncodedSample:
    return EncodedSample(segments)


IMAGE, OTHER = ImageSegment(b"\xff\xd8one"), ImageSegment(b"\xff\xd8two")


@pytest.mark.parametrize("kind", ["documents", "images"])
def test_the_loss_mask_does_not_make_a_difference(kind):
    one, other = sample(text(1, 2), text(3, train=False), IMAGE), sample(text(1, 2, 3), IMAGE)
    assert fingerprint(one, kind) == fingerprint(other, kind)


@pytest.mark.parametrize(
    "other",
    [
        sample(IMAGE, text(1, 3)),
        sample(text(1, 2), IMAGE),
        sample(OTHER, text(1, 2)),
        sample(IMAGE, IMAGE, text(1, 2)),
        sample(text(1, 2)),
        sample(ImageSegment(IMAGE.encoded + np.array([1], "<i4").tobytes()), text(2)),
    ],
)
def test_documents_differ_in_text_in_images_and_in_their_order(other):
    assert fingerprint(sample(IMAGE, text(1, 2)), "documents") != fingerprint(other, "documents")


def test_images_alone_count_where_there_are_any():
    assert fingerprint(sample(text(1), IMAGE), "images") == fingerprint(sample(IMAGE, text(2)), "images")
    assert fingerprint(sample(IMAGE, OTHER, text(1)), "images") != fingerprint(sample(OTHER, IMAGE, text(1)), "images")
    assert fingerprint(sample(text(1)), "images") != fingerprint(sample(text(2)), "images")


def save_pieces(folder, pieces: list[np.ndarray]) -> Fingerprints:
    folders = []
    for number, halves in enumerate(pieces):
        folders.append(folder / str(number))
        folders[-1].mkdir()
        records = np.zeros(len(halves), dtype=RECORD)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        np.save(folders[-1] / FINGERPRINTS_FILE, records)
    return Fingerprints(folders, [len(halves) for halves in pieces])


@pytest.mark.parametrize("bucket_samples", [7, 100, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_those_of_a_loop_over_all(tmp_path, bucket_samples, seed):
    generator = np.random.default_rng(seed)
    pieces = [generator.integers(0, 12, (size, 2)).astype(np.uint64) for size in (50, 0, 90, 1)]
    repeats = find_repeats(save_pieces(tmp_path, pieces), bucket_samples=bucket_samples)
    seen: dict[tuple, int] = {}
    expected = []
    for place, halves in enumerate(np.concatenate(pieces).tolist()):
        first = seen.setdefault(tuple(halves), place)
        if first != place:
            expected.append((place, first))
    assert list(zip(repeats.samples.tolist(), repeats.originals.tolist(), strict=True)) == expected
    assert expected


def test_memory_is_bounded_by_the_bucket(tmp_path):
    generator = np.random.default_rng(0)
    pieces = [generator.integers(0, 1 << 60, (100_000, 2)).astype(np.uint64) for _ in range(10)]
    fingerprints = save_pieces(tmp_path, pieces)
    tracemalloc.start()
    find_repeats(fingerprints, bucket_samples=50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # all of them are 24 MB


def test_no_sample_has_no_repeats(tmp_path):
    assert len(find_repeats(Fingerprints([], [])).samples) == 0
    assert len(find_repeats(save_pieces(tmp_path, [np.zeros((0, 2), np.uint64)])).samples) == 0


def test_damaged_files_of_a_piece_are_data_errors(tmp_path):
    fingerprints = save_pieces(tmp_path, [np.array([[1, 2]], dtype=np.uint64)])
    (tmp_path / "0" / ORIGINS_FILE).write_text('["f", 1')
    with pytest.raises(DataError, match="fingerprints have no line of each document"):
        fingerprints.origin(0)
    (tmp_path / "0" / FINGERPRINTS_FILE).write_bytes(b"x")
    with pytest.raises(DataError, match="fingerprints cannot be read"):
        join_fingerprints(tmp_path, [tmp_path / "0"])


def test_each_sample_leads_to_file_line_and_key_also_after_joining(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "both")]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        writer = FingerprintWriter(folder, "documents")
        writer.add([sample(text(1)), sample(text(2))], f"{folder.name}.jsonl", 1, "k\n")
        writer.add([sample(text(3))], f"{folder.name}.jsonl", None, None)
        writer.close()
    join_fingerprints(folders[2], folders[:2])
    apart, joined = Fingerprints(folders[:2], [3, 3]), Fingerprints(folders[2:], [6])
    expected = [("one.jsonl", 1, "k\n")] * 2 + [("one.jsonl", None, None)]
    expected += [("two.jsonl", 1, "k\n")] * 2 + [("two.jsonl", None, None)]
    assert [apart.origin(place) for place in range(6)] == expected
    assert [joined.origin(place) for place in range(6)] == expected
    assert find_repeats(joined).originals.tolist() == find_repeats(apart).originals.tolist() == [0, 1, 2]
