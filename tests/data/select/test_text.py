import gzip
import json
import logging
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError, DataError, StorageError, UsageError
from megatron_vlm.data.files.inputs import find_instruction_files
from megatron_vlm.data.select import text as module
from megatron_vlm.data.select.text import (
    REJECTS_FILE,
    REPORT_FILE,
    TextSelectRules,
    hash_record,
    select_text,
)


def flan(number: int) -> bytes:
    return json.dumps({"inputs": f"question {number}?", "targets": f"answer {number}"}).encode()


def write(path: Path, lines: list[bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path) -> dict[Path, list[bytes]]:
    """Five files of 200 lines; a third of the lines stand in several files or twice in one."""
    generator = random.Random(0)
    files = {}
    for number in range(5):
        lines = [flan(generator.randrange(1500)) for _ in range(200)]
        files[write(tmp_path / "raw" / f"part-{number}.jsonl", lines)] = lines
    return files


def kept_lines(folder: Path) -> dict[str, list[bytes]]:
    return {path.name: path.read_bytes().splitlines() for path in sorted(folder.glob("*.jsonl"))}


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [1, 7, 500, 999])
def test_the_smallest_hashes_of_all_files_are_kept_of_equal_ones_the_first(corpus, tmp_path, number):
    select_text(tuple(corpus), tmp_path / "out", TextSelectRules(number=number, seed=5))
    rows = [
        (hash_record(line, 5), path.name, place) for path, lines in corpus.items() for place, line in enumerate(lines)
    ]
    expected: dict[str, list[bytes]] = {}
    for _, name, place in sorted(sorted(rows)[:number], key=lambda row: row[1:]):
        expected.setdefault(name, []).append(corpus[tmp_path / "raw" / name][place])
    assert kept_lines(tmp_path / "out") == expected


def test_order_of_files_and_number_of_workers_change_no_byte(corpus, tmp_path):
    rules = TextSelectRules(number=100)
    files = tuple(corpus)
    select_text(files, tmp_path / "a", rules)
    select_text(files[::-1], tmp_path / "b", rules)
    select_text(files, tmp_path / "c", rules, num_workers=2)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b") == all_bytes(tmp_path / "c")


def test_another_seed_keeps_other_records(corpus, tmp_path):
    for seed in (-1, 0, 1):
        select_text(tuple(corpus), tmp_path / str(seed), TextSelectRules(number=50, seed=seed))
    assert len({str(kept_lines(tmp_path / str(seed))) for seed in (-1, 0, 1)}) == 3


def test_bytes_of_a_record_are_kept_as_they_are(tmp_path):
    odd = [b'{"inputs" :  "\xc3\xa9 \\u00e9", "targets":"\\n"}', b'{"b":1,"a":[1 ,2]}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + odd[0] + b"\r\n\r\n" + odd[1])
    select_text((path,), tmp_path / "out", TextSelectRules(number=2))
    assert kept_lines(tmp_path / "out") == {"a.jsonl": odd}


def test_every_container_gives_the_same_choice(tmp_path, make_table):
    values = [{"inputs": f"q {number}", "targets": "é"} for number in range(40)]
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    content = b"\n".join(lines)
    plain = write(tmp_path / "a" / "x.jsonl", lines)
    packed = tmp_path / "a" / "y.jsonl.gz"
    packed.write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a" / "z.jsonl.zip", "w") as archive:
        archive.writestr("1.jsonl", b"\n".join(lines[:10]))
        archive.writestr("2.jsonl", b"\n".join(lines[10:]))
    array = tmp_path / "a" / "u.json"
    array.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]")
    table = make_table(tmp_path / "a" / "v.parquet", {name: [row[name] for row in values] for name in values[0]})
    found = []
    for path in (plain, packed, tmp_path / "a" / "z.jsonl.zip", array, table):
        select_text((path,), tmp_path / path.name, TextSelectRules(number=9))
        ((name, kept),) = kept_lines(tmp_path / path.name).items()
        assert name == f"{path.name[0]}.jsonl"
        found.append(kept)
    assert all(kept == found[0] for kept in found)
    assert len(found[0]) == 9


def test_line_breaks_inside_of_a_record_of_an_array_become_blanks(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{\r\n "inputs": "q",\n "targets": "a"}]')
    select_text((tmp_path / "a.json",), tmp_path / "out", TextSelectRules(number=1))
    assert kept_lines(tmp_path / "out")["a.jsonl"] == [b'{   "inputs": "q",  "targets": "a"}']


def test_report_counts_add_up_and_name_the_rejects(tmp_path):
    bad = [b"{", b"[]", b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b'{"a": "' + b"x" * 300 + b'"}']
    first = write(tmp_path / "raw" / "a.jsonl", [flan(0), *bad, flan(1), flan(2)])
    cut = tmp_path / "raw" / "b.jsonl.gz"
    cut.write_bytes(gzip.compress(flan(3) + b"\n")[:-4])
    report = select_text((first, cut), tmp_path / "out", TextSelectRules(number=2, seed=4, max_record_bytes=200))
    assert report == json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["seed"] == 4
    assert report["records"] == 10
    assert report["records"] == report["kept"] + report["not_chosen"] + report["rejected"]
    assert report["kept"] == 2 == sum(len(lines) for lines in kept_lines(tmp_path / "out").values())
    assert report["rejects"] == {
        "file_truncated": 1,
        "invalid_utf8": 1,
        "json_duplicate_key": 1,
        "json_syntax": 1,
        "json_type": 1,
        "record_too_long": 1,
    }
    assert [file["input"] for file in report["files"]] == ["a.jsonl", "b.jsonl.gz"]
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS_FILE).read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejects[:5]] == [("a.jsonl", line) for line in range(2, 7)]
    assert (rejects[5]["file"], rejects[5]["reason"]) == ("b.jsonl.gz", "file_truncated")
    assert Counter(row["reason"] for row in rejects) == report["rejects"]


def test_row_of_parquet_that_json_cannot_hold_is_rejected(tmp_path, make_table):
    table = make_table(tmp_path / "a.parquet", {"inputs": ["q", "r"], "targets": [b"\xff", None]})
    report = select_text((table,), tmp_path / "out", TextSelectRules(number=2))
    assert report["rejects"] == {"json_type": 1}
    assert kept_lines(tmp_path / "out") == {"a.jsonl": [b'{"inputs": "r"}']}


def test_fewer_records_than_wanted_are_all_kept_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [flan(0), flan(1)])
    with caplog.at_level(logging.WARNING):
        report = select_text((path,), tmp_path / "out", TextSelectRules(number=3))
    assert report["kept"] == 2
    assert "only 2 records, fewer than the 3 wanted" in caplog.text


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    files = tuple(write(tmp_path / folder / "part.0.jsonl", [flan(number)]) for number, folder in enumerate("ab"))
    select_text(files, tmp_path / "out", TextSelectRules(number=2))
    assert list(kept_lines(tmp_path / "out")) == ["a-part.0.jsonl", "b-part.0.jsonl"]


def test_output_is_an_input_of_prepare_and_the_report_is_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [flan(0), flan(1)])
    select_text((path,), tmp_path / "out", TextSelectRules(number=1))
    assert find_instruction_files((tmp_path / "out",)) == (tmp_path / "out" / "a.jsonl",)


def test_number_below_one_is_refused():
    with pytest.raises(UsageError, match="--number 0 is below 1"):
        TextSelectRules(number=0)


def test_output_that_holds_anything_is_refused(tmp_path):
    path = write(tmp_path / "out" / "a.jsonl", [flan(0)])
    with pytest.raises(ConfigError, match="output folder is not empty"):
        select_text((path,), tmp_path / "out", TextSelectRules(number=1))


def test_files_that_would_be_written_to_the_same_one_are_refused(tmp_path):
    path, packed = write(tmp_path / "a.jsonl", [flan(0)]), tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(flan(0)))
    with pytest.raises(ConfigError, match=r"2 input files would be written to a.jsonl: a.jsonl, a.jsonl.gz"):
        select_text((path, packed), tmp_path / "out", TextSelectRules(number=1))
    with pytest.raises(ConfigError, match="give each file once"):
        select_text((path, path), tmp_path / "out", TextSelectRules(number=1))


def test_no_record_at_all_is_an_error_that_counts_the_rejects(tmp_path):
    path = write(tmp_path / "a.jsonl", [b"{"])
    with pytest.raises(DataError, match=r"no record in 1 files; rejects \{'json_syntax': 1\}"):
        select_text((path,), tmp_path / "out", TextSelectRules(number=1))
    assert not (tmp_path / "out").exists()


def test_file_that_changes_between_the_passes_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [flan(number) for number in range(9)])
    choose = module._choose

    def shorten(*arguments):
        write(path, [flan(0)])
        return choose(*arguments)

    monkeypatch.setattr(module, "_choose", shorten)
    with pytest.raises(DataError, match="does not exist any more; the file has changed meanwhile .*a.jsonl"):
        select_text((path,), tmp_path / "out", TextSelectRules(number=9))


def test_disk_that_cannot_be_written_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [flan(0)])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="selection cannot be written"):
        select_text((path,), tmp_path / "file" / "out", TextSelectRules(number=1))
