import gzip
import json
import time
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.files import records
from megatron_vlm.data.files.records import field, parse_record, read_records
from megatron_vlm.data.rejects import RejectError

GOOD = [{"a": 1, "text": 'quote " brace } comma , [ \\'}, {"a": 2, "b": [{"c": "]"}]}, {"a": 3}]


def read(path, **options):
    return [
        (r.line, r.value.reason if isinstance(r.value, RejectError) else r.value) for r in read_records(path, **options)
    ]


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def lines(values=GOOD) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_every_container_gives_the_same_records(tmp_path):
    content = lines()
    plain = write(tmp_path / "a.jsonl", content)
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("folder/a.jsonl", content)
    compact = write(tmp_path / "a.json", json.dumps(GOOD).encode())
    pretty = write(tmp_path / "b.json", json.dumps(GOOD, indent=2).encode())
    for path in (plain, packed, tmp_path / "a.jsonl.zip", compact, pretty):
        assert [value for _, value in read(path)] == GOOD


def test_bom_and_crlf_and_blank_lines_are_no_part_of_the_records(tmp_path):
    content = b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n") + b"\r\n  \r\n"
    assert read(write(tmp_path / "a.jsonl", content)) == list(zip((1, 2, 3), GOOD, strict=True))


def test_nan_and_infinities_are_missing_values(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": NaN, "b": [1, -Infinity]}\n')
    assert [record for _, record in read(path)] == [{"a": None, "b": [1, None]}]


def test_line_numbers_of_an_array_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.json", b'[\n\n{"a": 1},\n {"b":\n 2}, {"c": 3}\n]\n')
    assert [line for line, _ in read(path)] == [3, 4, 5]


BAD_RECORDS = [
    (b'{"a": 1', "json_syntax"),
    (b"{'a': 1}", "json_syntax"),
    (b'{"a": ' + b"9" * 5000 + b"}", "json_syntax"),
    (b'{"a": 1, "a": 2}', "json_duplicate_key"),
    (b'{"x": {"a": 1, "a": 1}}', "json_duplicate_key"),
    (b'"text"', "json_type"),
    (b"17", "json_type"),
    (b"null", "json_type"),
    (b'{"a": "\xff\xfe"}', "invalid_utf8"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json_nesting"),
    (b'{"a": "' + b"x" * 3000 + b'"}', "record_too_long"),
    (b"\x00" * 100, "json_syntax"),
    (b"<html>", "json_syntax"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_RECORDS)
def test_a_bad_line_is_rejected_and_its_neighbours_are_intact(tmp_path, bad, reason):
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n' + bad + b'\n{"a": 2}\n')
    limit = 2000 if reason == "record_too_long" else records.MAX_RECORD_BYTES
    assert read(path, max_bytes=limit) == [(1, {"a": 0}), (2, reason), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [case for case in BAD_RECORDS if case[0] != b'{"a": 1'] + [(b'{"a": [1}', "json_syntax"), (b"{}}", "json_syntax")],
)
def test_a_bad_array_element_is_rejected_and_its_neighbours_are_intact(tmp_path, bad, reason):
    path = write(tmp_path / "a.json", b'[{"a": 0},\n' + bad + b',\n{"a": 2}]\n')
    limit = 2000 if reason == "record_too_long" else records.MAX_RECORD_BYTES
    assert read(path, max_bytes=limit) == [(1, {"a": 0}), (2, reason), (3, {"a": 2})]


def test_a_string_without_its_end_spoils_its_own_line_of_an_array_only(tmp_path):
    path = write(tmp_path / "a.json", b'[\n{"a": 0},\n{"a": "x},\n{"a": 2}\n]\n')
    assert read(path)[0] == (2, {"a": 0})
    assert [value for _, value in read(path)].count("json_syntax") <= 1


def test_truncated_array_keeps_what_is_whole(tmp_path):
    content = json.dumps(GOOD).encode()
    path = write(tmp_path / "a.json", content[:-4])
    assert read(path) == [(1, GOOD[0]), (1, GOOD[1]), (1, "file_truncated")]


def test_data_after_an_array_is_a_reject(tmp_path):
    assert read(write(tmp_path / "a.json", b'[{"a": 1}] {"b": 2}')) == [(1, {"a": 1}), (1, "json_syntax")]


def test_truncated_gzip_keeps_the_lines_before(tmp_path):
    content = gzip.compress(b"".join(b'{"a": %d, "b": "%d"}\n' % (i, i * 7919 % 10007) for i in range(3000)))
    content = content[: len(content) // 2]
    whole_lines = zlib.decompressobj(wbits=31).decompress(content).count(b"\n")
    assert whole_lines > 1000
    found = read(write(tmp_path / "a.jsonl.gz", content))
    assert found[-1] == (whole_lines + 1, "file_truncated")
    assert [value["a"] for _, value in found[:-1]] == list(range(whole_lines))


def test_damaged_member_of_a_zip_keeps_the_lines_before(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", b"".join(b'{"a": %d}\n' % i for i in range(300_000)))
    content = bytearray((tmp_path / "a.jsonl.zip").read_bytes())
    content[-200] ^= 1  # in one of the last lines: the checksum at the end of the member finds it
    found = read(write(tmp_path / "a.jsonl.zip", bytes(content)))
    assert found[-1][1] == "file_truncated"
    assert len(found) > 290_000
    assert [value["a"] for _, value in found[:290_000]] == list(range(290_000))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_of_one_member_of_a_zip_harms_no_other(tmp_path, compression):
    lines = b"".join(b'{"a": "%d"}\n' % (number * 7919 % 10007) for number in range(3000))
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w", compression) as archive:
        for name in ("a.jsonl", "b.jsonl"):
            archive.writestr(name, lines)
        middle = archive.infolist()[0].compress_size // 2
    content = bytearray((tmp_path / "a.jsonl.zip").read_bytes())
    content[middle : middle + 100] = bytes(100)
    found = [value for _, value in read(write(tmp_path / "a.jsonl.zip", bytes(content)))]
    damaged = found.index("file_truncated")
    assert found[damaged + 1 :] == [json.loads(line) for line in lines.splitlines()]


def zip_of(path, *members) -> bytearray:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("start", "offset"),
    [(b"PK\3\4", 0), (b"PK\3\4", 30), (b"PK\1\2", 8), (b"PK\1\2", 10)],
    ids=["magic", "name", "encrypted", "compression"],
)
def test_damage_of_a_member_s_header_harms_no_other(tmp_path, start, offset):
    content = zip_of(tmp_path / "a.jsonl.zip", *((f"{name}.jsonl", lines()) for name in "abc"))
    content[content.index(start) + offset] ^= 1
    found = [value for _, value in read(write(tmp_path / "a.jsonl.zip", bytes(content)))]
    assert found == ["file_truncated", *GOOD, *GOOD]


def test_no_damaged_bit_of_a_zip_makes_other_records_or_stops_the_reader(tmp_path):
    content = zip_of(tmp_path / "a.jsonl.zip", ("a.jsonl", lines()), ("b.jsonl", lines()))
    for at in range(len(content)):
        for bit in (1, 16, 128):
            damaged = content.copy()
            damaged[at] ^= bit
            found = [value for _, value in read(write(tmp_path / "a.jsonl.zip", bytes(damaged)))]
            assert all(value == "file_truncated" or value in GOOD for value in found), (at, bit)


def test_members_of_one_name_are_each_read(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(tmp_path / "a.jsonl.zip", ("a.jsonl", lines(GOOD[:1])), ("a.jsonl", lines(GOOD[1:])))
    assert [value for _, value in read(tmp_path / "a.jsonl.zip")] == GOOD


def test_file_that_is_no_archive_is_one_reject(tmp_path):
    for content in (b"<html>", b""):
        assert read(write(tmp_path / "a.jsonl.gz", content)) == [(1, "file_truncated")]
        assert read(write(tmp_path / "a.jsonl.zip", content)) == [(1, "file_truncated")]


def test_empty_file_has_no_records(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b"")) == []
    assert read(write(tmp_path / "a.json", b"[]")) == []


@pytest.mark.parametrize("opening", [b"", b"["])
def test_a_huge_record_takes_bounded_memory_and_time(tmp_path, opening):
    import resource

    path = tmp_path / "a.json"
    with path.open("wb") as stream:
        stream.write(opening + b'{"a": "')
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}' + (b',\n{"b": 1}]' if opening else b'\n{"b": 1}\n'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    assert read(path) == [(1, "record_too_long"), (2, {"b": 1})]
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=4), max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_any_array_is_split_as_json_reads_it_for_any_chunk_size(tmp_path_factory, values, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("a") / "a.json"
    write(path, json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    original = records._BLOCK_BYTES
    records._BLOCK_BYTES = chunk
    try:
        found = [record.value for record in read_records(path)]
    finally:
        records._BLOCK_BYTES = original
    assert found == values


def test_field_checks_presence_and_type():
    assert field({"a": 1}, "a", int) == 1
    for record, message in (({}, "a is missing"), ({"a": "1"}, "is str, not int"), ({"a": True}, "is bool, not int")):
        with pytest.raises(RejectError, match=message):
            field(record, "a", int)


def test_single_record_raises_what_a_file_would_yield():
    assert parse_record(b'{"a": 1}') == {"a": 1}
    with pytest.raises(RejectError, match="json_type"):
        parse_record(b"[]")
