import io
import tarfile

import numpy as np
import pytest

from megatron_vlm.data.files.tars import Member, TarReader, find_image, group_members, list_members
from megatron_vlm.data.rejects import RejectError

LONG = "folder/" + "n" * 180 + ".tail.jpg"
FILES = [("a.jpg", b"1" * 600), ("a.txt", b"caption"), ("folder/ä.png", b""), (LONG, b"x" * 512)]


def read_all(path) -> list[tuple[str, bytes]]:
    with TarReader(path) as tar:
        return [(member.name, tar.read(member, 10**6, "image_bytes")) for member in tar.members()]


@pytest.mark.parametrize("file_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_the_standard_library(tmp_path, make_tar, file_format):
    assert read_all(make_tar(tmp_path / "a.tar", FILES, format=file_format)) == FILES


def test_ustar_prefixes_are_read(tmp_path, make_tar):
    files = [("p" * 90 + "/" + "n" * 90, b"x")]
    assert read_all(make_tar(tmp_path / "a.tar", files, format=tarfile.USTAR_FORMAT)) == files


def test_folders_and_links_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo("a")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    assert read_all(tmp_path / "a.tar") == []


def test_truncated_tar_gives_the_members_before_and_an_error(tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 100])
    with TarReader(path) as tar:
        members = tar.members()
        assert next(members).name == "a.jpg"
        with pytest.raises(RejectError, match="tar_truncated: the member at byte 2048 has 600 bytes, 100 are there"):
            next(members)


def test_tar_that_ends_between_two_members_is_truncated_too(tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)])
    path.write_bytes(path.read_bytes()[: 512 + 1024])
    with TarReader(path) as tar:
        members = tar.members()
        assert next(members).name == "a.jpg"
        with pytest.raises(RejectError, match="tar_truncated: .* without the end mark"):
            next(members)


@pytest.mark.parametrize("content", [b"<html>" * 200, b"\xff" * 2000])
def test_file_that_is_no_tar_is_an_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with TarReader(tmp_path / "a.tar") as tar, pytest.raises(RejectError, match="tar_damaged"):
        list(tar.members())


def test_file_shorter_than_a_header_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"short")
    with TarReader(tmp_path / "a.tar") as tar, pytest.raises(RejectError, match="tar_truncated"):
        list(tar.members())


def test_random_damage_is_an_error_or_nothing_but_never_a_crash_or_a_loop(tmp_path, make_tar):
    content = make_tar(tmp_path / "a.tar", FILES).read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(content)
        damaged[generator.integers(0, 6000)] = generator.integers(0, 256)
        (tmp_path / "b.tar").write_bytes(damaged)
        try:
            outcomes.add(len(read_all(tmp_path / "b.tar")) <= len(FILES))
        except RejectError as error:
            outcomes.add(error.reason.startswith("tar_"))
    assert outcomes == {True}


def test_key_and_extension_split_at_the_first_dot_of_the_name():
    member = Member("a.b/000.seg.JPG", 0, 0)
    assert (member.key, member.extension) == ("a.b/000", "seg.jpg")


def test_files_are_grouped_by_key_however_they_are_ordered():
    names = ["1.jpg", "2.jpg", "2.txt", "1.txt"]
    groups = group_members(Member(name, 0, 0) for name in names)
    assert {key: sorted(group) for key, group in groups.items()} == {"1": ["jpg", "txt"], "2": ["jpg", "txt"]}


def test_a_name_that_comes_twice_is_marked():
    group = group_members(iter([Member("1.jpg", 0, 0), Member("1.jpg", 512, 0)]))["1"]
    assert group == {"jpg": None}
    assert find_image(group) is None


def with_size(path, number: int, field: bytes) -> bytes:
    """Return a tar of one file of `number` zeros whose header has another size field, with its checksum right."""
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(number)


@pytest.mark.parametrize(
    "field",
    [b"-0000002000\0", b"+0000002000\0", b"0000_002000\0", b"\xff" * 12, b"\xff" * 11 + b"\0", b"0000002000\0x"],
)
def test_a_size_that_is_no_octal_number_is_damage_and_never_a_way_back(tmp_path, make_tar, field):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"")])
    path.write_bytes(path.read_bytes()[:512] + with_size(path, 1024, field))
    with TarReader(path) as tar:
        members = tar.members()
        assert next(members).name == "a.jpg"
        with pytest.raises(RejectError, match="tar_damaged: no tar header at byte 512"):
            next(members)


def test_a_size_in_base_256_is_read(tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", bytes(512))])
    path.write_bytes(with_size(path, 512 + 1024, b"\x80" + (512).to_bytes(11, "big")))
    assert read_all(path) == [("a.jpg", bytes(512))]


def make_pax(path, records: dict[str, str], content: bytes = b"x"):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("right.jpg")
        entry.size, entry.pax_headers = len(content), records
        archive.addfile(entry, io.BytesIO(content))
    return path


def test_a_line_break_in_a_pax_record_begins_no_other(tmp_path):
    path = make_pax(tmp_path / "a.tar", {"comment": "a\n21 path=../evil.jpg\nb", "path": "two\nlines.jpg"})
    assert read_all(path) == [("two\nlines.jpg", b"x")]
    assert read_all(make_pax(tmp_path / "b.tar", {"comment": "\n21 path=../evil.jpg"})) == [("right.jpg", b"x")]


def test_a_size_of_a_pax_record_is_that_of_the_file(tmp_path):
    path = make_pax(tmp_path / "a.tar", {"size": "1000", "comment": "of"}, bytes(1000))
    content = bytearray(path.read_bytes())
    content[1024:1536] = with_size_of_zero(bytes(content[1024:1536]))
    path.write_bytes(content)
    assert read_all(path) == [("right.jpg", bytes(1000))]


def with_size_of_zero(header: bytes) -> bytes:
    changed = bytearray(header)
    changed[124:136] = b"00000000000\0"
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


@pytest.mark.parametrize(
    "records",
    [b"9 path=a\n", b"99 path=a\n", b"-9 path=a\n", b"path=a\n", b"10 path=abc\n", b"7 path\n", b"0 path=a\n"],
)
def test_damaged_pax_records_are_damage(tmp_path, records):
    path = make_pax(tmp_path / "a.tar", {"comment": "x"})
    content = path.read_bytes()
    path.write_bytes(content[:512] + records + b"#" * (512 - len(records)) + content[1024:])
    with pytest.raises(RejectError, match="tar_damaged"):
        read_all(path)


@pytest.mark.parametrize("padding", [512, 10240, (1 << 20) + 512])
def test_tars_written_one_after_the_other_have_all_their_members(tmp_path, make_tar, padding):
    parts = [make_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", bytes([n + 1]) * 600)]) for n in range(2)]
    first, second = (path.read_bytes()[: 512 + 1024] for path in parts)
    (tmp_path / "a.tar").write_bytes(first + bytes(padding) + second + bytes(padding))
    assert read_all(tmp_path / "a.tar") == [("0.jpg", b"\1" * 600), ("1.jpg", b"\2" * 600)]


@pytest.mark.parametrize("rest", [b"junk" * 200, b"junk", b"\n"])
def test_what_follows_the_end_of_a_tar_and_is_none_is_told(tmp_path, make_tar, rest):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    path.write_bytes(path.read_bytes() + rest)
    with TarReader(path) as tar:
        members, damage = list_members(tar)
    assert [member.name for member in members] == ["a.jpg"]
    assert damage is not None


@pytest.mark.parametrize("zeros", [512, 1024, 4096])
def test_a_hole_of_zeros_does_not_pass_for_the_end(tmp_path, make_tar, zeros):
    path = make_tar(tmp_path / "a.tar", [(f"{number}.jpg", b"1" * 600) for number in range(20)])
    content = bytearray(path.read_bytes())
    start = 5 * (512 + 1024)
    content[start : start + zeros] = bytes(zeros)
    path.write_bytes(content)
    with TarReader(path) as tar:
        members, damage = list_members(tar)
    assert [member.name for member in members] == [f"{number}.jpg" for number in range(5)]
    assert damage is not None


def test_a_second_tar_whose_first_header_is_damaged_is_told(tmp_path, make_tar):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    second = bytearray(make_tar(tmp_path / "b.tar", [("b.jpg", b"2"), ("c.jpg", b"3")]).read_bytes())
    second[10] ^= 1
    path.write_bytes(path.read_bytes() + second)
    with TarReader(path) as tar:
        members, damage = list_members(tar)
    assert [member.name for member in members] == ["a.jpg"]
    assert damage is not None
