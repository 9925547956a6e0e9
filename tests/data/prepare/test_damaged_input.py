"""Every reader of raw corpora against what is wrong with corpora: one reject each, neighbours intact, little memory."""

import base64
import io
import json
import multiprocessing
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader
from megatron_vlm.data.sources.instructions.conversations import ConversationSource
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.interleaved.tables import InterleavedTableSource
from megatron_vlm.data.sources.interleaved.tars import InterleavedTarSource
from megatron_vlm.data.sources.pairs.source import RecordPairSource, TarPairSource
from megatron_vlm.data.sources.source import Found
from megatron_vlm.data.sources.text import TextSource
from tests.support.damaged_images import REFUSED, TAKEN, encode

GOOD = encode()


def write_lines(path: Path, records: list) -> None:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def in_folder(make_record: Callable[[str, str], dict]) -> Callable[[Path, list[bytes]], Path]:
    """Write the images as files of a folder, and a record for each: make_record(name, base64)."""

    def write(root: Path, images: list[bytes]) -> Path:
        records = []
        for number, data in enumerate(images):
            (root / f"{number}.jpg").write_bytes(data)
            records.append(make_record(f"{number}.jpg", base64.b64encode(data).decode()))
        write_lines(root / "a.jsonl", records)
        return root / "a.jsonl"

    return write


def mmc4(name: str, _: str) -> dict:
    return {"text_list": ["t"], "image_info": [{"image_name": name, "matched_text_index": 0}]}


def mmc4_base64(_: str, encoded: str) -> dict:
    return {"text_list": ["t"], "image_info": [{"image_base64": encoded, "matched_text_index": 0}]}


def llava(name: str, _: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    return {"image": name, "conversations": turns}


def caption(name: str, _: str) -> dict:
    return {"image": name, "caption": "t"}


def in_pair_tar(root: Path, images: list[bytes]) -> Path:
    files = {}
    for number, data in enumerate(images):
        files |= {f"{number}.jpg": data, f"{number}.txt": b"t"}
    write_tar(root / "a.tar", files)
    return root / "a.tar"


def in_interleaved_tar(root: Path, images: list[bytes]) -> Path:
    files = {}
    for number, data in enumerate(images):
        files |= {f"{number}.json": b'{"texts": [null, "t"], "images": ["0.jpg", null]}', f"{number}.0.jpg": data}
    write_tar(root / "a.tar", files)
    return root / "a.tar"


def in_table(root: Path, images: list[bytes]) -> Path:
    columns = {"images": [[data, None] for data in images], "texts": [[None, "t"]] * len(images)}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "a.parquet")
    return root / "a.parquet"


READERS: dict[str, tuple[Any, Callable[[Path, list[bytes]], Path]]] = {
    "mmc4, folder": (InterleavedSource(()), in_folder(mmc4)),
    "mmc4, base64": (InterleavedSource(()), in_folder(mmc4_base64)),
    "interleaved tar": (InterleavedTarSource(()), in_interleaved_tar),
    "interleaved table": (InterleavedTableSource(()), in_table),
    "pair tar": (TarPairSource(()), in_pair_tar),
    "pair records": (RecordPairSource(()), in_folder(caption)),
    "conversations": (ConversationSource(()), in_folder(llava)),
}


def read(source: Any, path: Path) -> tuple[list[Found], ImageReader]:
    images = ImageReader(FolderImages(path.parent, max_bytes=1 << 20), ImageRules(max_bytes=1 << 20))
    return list(source.read(path, images)), images


def reasons(found: list[Found]) -> list[str | None]:
    return [one.document.reason if isinstance(one.document, RejectError) else None for one in found]


@pytest.mark.parametrize("reader", READERS)
def test_bad_images_are_rejected_by_reason_and_their_neighbours_are_intact(tmp_path, reader):
    source, write = READERS[reader]
    images, expected = [GOOD], [None]
    for data, reason in REFUSED.values():
        images += [data, GOOD]
        expected += [reason, None]
    found, _ = read(source, write(tmp_path, images))
    assert reasons(found) == expected
    assert all(one.document.images[0].data == GOOD for one in found[::2])
    assert all(one.line == number or one.line is None for number, one in enumerate(found, start=1))
    assert all(one.line is not None or one.key == str(number) for number, one in enumerate(found))


@pytest.mark.parametrize("reader", READERS)
def test_unusual_images_are_taken_as_they_are_and_animations_are_counted(tmp_path, reader):
    source, write = READERS[reader]
    found, images = read(source, write(tmp_path, list(TAKEN.values())))
    assert [one.document.images[0].data for one in found] == list(TAKEN.values())
    assert images.notes["animated_images"] == 1


def huge(prefix: bytes, suffix: bytes, count: int = 40 << 20) -> bytes:
    return prefix + b"x" * count + suffix


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "truncated": (b'{"text_list": ["t"', "json_syntax"),
    "an array": (b'["t"]', "json_type"),
    "a number": (b"7", "json_type"),
    "duplicate keys": (b'{"text_list": ["t"], "text_list": ["t"]}', "json_duplicate_key"),
    "deep nesting": (b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}", "json_nesting"),
    "deep objects": (b'{"a": ' * 300_000 + b"1" + b"}" * 300_000, "json_nesting"),
    "invalid UTF-8": (b'{"text_list": ["\xff\xfe"]}', "invalid_utf8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), "json_syntax"),
    "BOM inside": (b'\xef\xbb\xbf{"a": 1}', "json_syntax"),
    "huge line": (huge(b'{"a": "', b'"}'), "record_too_long"),
    "huge number": (b'{"a": ' + b"9" * 100_000 + b"}", "json_syntax"),
}


def bad_text(make: Callable[[str], dict]) -> dict[str, tuple[dict, str]]:
    return {
        "control characters": (make("a\x00b"), "control_character"),
        "a million placeholders": (make("<image>" * 1_000_000), "text_too_long"),
        "half a surrogate pair": (make("\ud800"), "invalid_unicode"),
    }


RECORDS: dict[str, tuple[Any, dict, dict[str, tuple[dict, str]]]] = {
    "mmc4": (
        InterleavedSource(()),
        mmc4("0.jpg", ""),
        bad_text(lambda text: mmc4("0.jpg", "") | {"text_list": [text]})
        | {
            "wrong type": (mmc4("0.jpg", "") | {"text_list": {"a": 1}}, "json_type"),
            "path outside": (mmc4("../../etc/passwd", ""), "image_path"),
            "absolute path": (mmc4("/etc/passwd", ""), "image_path"),
            "a folder": (mmc4("sub", ""), "image_missing"),
        },
    ),
    "pairs": (
        RecordPairSource(()),
        caption("0.jpg", ""),
        bad_text(lambda text: {"image": "0.jpg", "caption": text})
        | {
            "wrong type": ({"image": "0.jpg", "caption": ["t"]}, "json_type"),
            "path outside": (caption("../0.jpg", ""), "image_path"),
            "absolute path": (caption("/etc/passwd", ""), "image_path"),
        },
    ),
    "conversations": (
        ConversationSource(()),
        llava("0.jpg", ""),
        bad_text(
            lambda text: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]},
        )
        | {
            "wrong type": ({"conversations": 7}, "json_type"),
            "path outside": (llava("../../etc/passwd", ""), "image_path"),
            "absolute path": (llava("/etc/passwd", ""), "image_path"),
        },
    ),
    "text": (
        TextSource(()),
        {"inputs": "q", "targets": "a"},
        bad_text(lambda text: {"inputs": "q", "targets": text})
        | {"wrong type": ({"inputs": 7, "targets": "a"}, "json_type")},
    ),
}


def peak_kib() -> int:
    """Return the most memory that this process has had; what getrusage says includes that of its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def measure(source: Any, path: Path, connection: Any) -> None:
    """Read a file in a process of its own; send what came, the slowest document's CPU time, and the memory."""
    images = ImageReader(FolderImages(path.parent, max_bytes=1 << 20), ImageRules(max_bytes=1 << 20))
    found: list[str | None] = []
    slowest, start = 0.0, time.process_time()
    for one in source.read(path, images):
        slowest = max(slowest, time.process_time() - start)
        found += reasons([one])
        start = time.process_time()
    connection.send((found, slowest, peak_kib()))


def read_measured(source: Any, path: Path, *, max_rss_kib: int = 1 << 20, max_seconds: float = 1.0) -> list[str | None]:
    """Return what came of each document; none may take a second, nor all of them a GiB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(source, path, sender))
    process.start()
    sender.close()
    found, slowest, peak = receiver.recv()
    process.join()
    assert slowest < max_seconds
    assert peak < max_rss_kib, peak
    return found


@pytest.mark.parametrize("kind", RECORDS)
def test_bad_records_are_rejected_by_reason_in_little_time_and_memory(tmp_path, kind):
    source, good, own = RECORDS[kind]
    (tmp_path / "0.jpg").write_bytes(GOOD)
    (tmp_path / "sub").mkdir()
    records: list = [b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\r"]
    expected: list[str | None] = [None]
    for record, reason in (BAD_JSON | own).values():
        records += [record, json.dumps(good).encode() + b"\r"]
        expected += [reason, None]
    write_lines(tmp_path / "a.jsonl", records)
    assert read_measured(source, tmp_path / "a.jsonl") == expected


def sparse_tar(path: Path, files: list[tuple[str, bytes | int]]) -> None:
    """Write a tar; a number is that many bytes of nothing, which take no place on the disk."""
    with path.open("wb") as stream:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = content if isinstance(content, int) else len(content)
            stream.write(entry.tobuf(tarfile.GNU_FORMAT))
            if isinstance(content, int):
                stream.seek(entry.size, io.SEEK_CUR)
            else:
                stream.write(content)
            stream.seek(-(-stream.tell() // 512) * 512)
        stream.truncate(stream.tell() + 1024)


@pytest.mark.parametrize("kind", ["pairs", "interleaved"])
def test_huge_members_of_a_tar_are_rejected_unread(tmp_path, kind):
    record = b'{"texts": [null, "t"], "images": ["0.jpg", null]}'
    sizes: list[tuple[str, bytes | int]]
    if kind == "pairs":
        sizes = [("a.jpg", 4 << 30), ("a.txt", b"t"), ("b.jpg", GOOD), ("b.txt", 4 << 30)]
        sizes += [("c.jpg", GOOD), ("c.json", 4 << 30), ("d.jpg", GOOD), ("d.txt", b"t")]
        expected = ["image_bytes", "text_too_long", "record_too_long", None]
    else:
        sizes = [("a.json", record), ("a.0.jpg", 4 << 30), ("b.json", 4 << 30), ("c.0.txt", 4 << 30)]
        sizes += [("d.json", record), ("d.0.jpg", GOOD)]
        expected = ["image_bytes", "record_too_long", "text_too_long", None]
    sparse_tar(tmp_path / "a.tar", sizes)
    source = TarPairSource(()) if kind == "pairs" else InterleavedTarSource(())
    assert read_measured(source, tmp_path / "a.tar") == expected


def test_a_document_of_many_large_images_is_read_in_little_memory(tmp_path):
    large = GOOD[:-2] + bytes(1 << 20)[: (1 << 20) - len(GOOD)] + GOOD[-2:]
    (tmp_path / "0.jpg").write_bytes(large)
    infos = [{"image_name": "0.jpg", "matched_text_index": 0}] * 1000
    write_lines(tmp_path / "a.jsonl", [{"text_list": ["t"], "image_info": infos}])
    assert read_measured(InterleavedSource(()), tmp_path / "a.jsonl") == [None]


def test_a_row_group_of_many_pictures_is_read_in_pieces(tmp_path):
    data = GOOD[:-2] + bytes(1 << 20)[len(GOOD) :] + GOOD[-2:]
    pictures = pyarrow.ListArray.from_arrays(range(0, 801, 2), pyarrow.array([data, None] * 400))
    table = pyarrow.table({"images": pictures, "texts": [[None, "t"]] * 400})
    # A page is read at once; it has at least as many values as are written together.
    options = {"row_group_size": 400, "write_batch_size": 8, "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", **options)
    del pictures, table
    found = read_measured(InterleavedTableSource(()), tmp_path / "a.parquet", max_rss_kib=520 << 10, max_seconds=10)
    assert found == [None] * 400
