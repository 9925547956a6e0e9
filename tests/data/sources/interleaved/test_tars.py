import base64
import json
import tarfile

import pytest

from megatron_vlm.config.prepare import ImageRules, TextRules
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.documents import Text
from megatron_vlm.data.files.join_index import save_join_index
from megatron_vlm.data.sources.image_store import ImageReader, TarImages, index_tar
from megatron_vlm.data.sources.interleaved.tars import InterleavedTarSource
from tests.support.documents import show


@pytest.fixture(scope="module")
def pictures(make_image):
    return {name: make_image(seed=seed) for seed, name in enumerate("ABC")}


@pytest.fixture
def reader():
    return ImageReader(None, ImageRules(max_bytes=1 << 20))


@pytest.fixture
def read(tmp_path, make_tar, pictures, reader):
    """Read a tar: values are written as JSON, one-letter texts as the picture of that name."""

    def read(members, **rules):
        files = []
        for name, value in members:
            content = json.dumps(value).encode() if isinstance(value, dict) else value
            files.append((name, pictures[content] if isinstance(content, str) else content))
        path = make_tar(tmp_path / "0.tar", files)
        found = list(InterleavedTarSource((path,), InterleavedRules(**rules)).read(path, reader))
        names = {data: name for name, data in pictures.items()}
        return [(one.key, show(one, names)) for one in found]

    return read


def test_texts_and_images_stand_at_their_places(read):
    record = {"texts": ["one", None, "two", None], "images": [None, "0.jpg", None, "1.jpg"]}
    files = [("k.json", record), ("k.0.jpg", "A"), ("k.1.jpg", "B")]
    assert read(files) == [("k", ["one", "A", "two", "B"])]


def test_other_lists_beside_them_are_no_matter(read):
    record = {"texts": ["t", None], "images": [None, "2345ew.JPG"], "audios": [None, None], "duration": [None, None]}
    assert read([("k.json", record), ("k.2345ew.JPG", "A")]) == [("k", ["t", "A"])]


def test_an_image_may_be_named_with_its_key_and_folder(read):
    for name in ("0.jpg", "k.0.jpg", "d/k.0.jpg"):
        record = {"texts": ["t", None], "images": [None, name]}
        assert read([("d/k.json", record), ("d/k.0.jpg", "A")]) == [("d/k", ["t", "A"])]


def test_train_says_which_texts_are_targets(tmp_path, make_tar, pictures, reader):
    record = {"texts": ["q", None, "a"], "images": [None, "0.jpg", None], "train": [False, True, True]}
    path = make_tar(tmp_path / "0.tar", [("k.json", json.dumps(record).encode()), ("k.0.jpg", pictures["A"])])
    (found,) = InterleavedTarSource((path,)).read(path, reader)
    assert [s for s in found.document.segments if isinstance(s, Text)] == [Text("q", False), Text("a", True)]


def test_sequence_mixes_names_and_text_in_one_list(read):
    record = {"sequence": ["0.jpg", "a cat", {"image": "1.jpg"}, {"text": "0.jpg"}]}
    assert read([("k.json", record), ("k.0.jpg", "A"), ("k.1.jpg", "B")]) == [("k", ["A", "a cat", "B", "0.jpg"])]


def test_mmc4_records_find_their_images_in_the_tar_or_as_base64(read, pictures):
    infos = [
        {"image_name": "x.jpg", "matched_text_index": 1},
        {"image_name": "y", "matched_text_index": 0, "image_base64": base64.b64encode(pictures["B"]).decode()},
    ]
    record = {"text_list": ["s0", "s1"], "image_info": infos, "similarity_matrix": [[1, 0], [0, 1]]}
    files = [("k.x.jpg", "A"), ("k.json", record)]
    assert read(files) == [("k", ["B", "s0", "A", "s1"])]
    assert read(files, assignment="linear") == [("k", ["A", "s0", "B", "s1"])]


def test_matched_text_indices_are_mmc4_in_other_words(read):
    record = {"texts": ["s0", "s1"], "images": ["0.jpg", "1.jpg"], "matched_text_indices": [1, 1]}
    assert read([("k.json", record), ("k.0.jpg", "A"), ("k.1.jpg", "B")]) == [("k", ["s0", "A", "B", "s1"])]


def test_files_without_json_stand_in_the_order_of_their_numbers(read):
    files = [("k.10.txt", b"last"), ("k.2.jpg", "B"), ("k.0.txt", b"first"), ("k.1.jpg", "A"), ("k.2.txt", b"b")]
    assert read(files) == [("k", ["first", "A", "B", "b", "last"])]


def test_images_by_url_come_from_the_tars_of_images(tmp_path, make_tar, pictures):
    url = "http://x/1.jpg"
    made = make_tar(tmp_path / "images.tar", [("0.jpg", pictures["A"]), ("0.json", json.dumps({"url": url}).encode())])
    save_join_index([index_tar(made, 0)], tmp_path / "index")
    images = ImageReader(TarImages((made,), tmp_path / "index", max_bytes=1 << 20), ImageRules())
    record = {"texts": [None, "t"], "images": [url, None]}
    path = make_tar(tmp_path / "docs.tar", [("k.json", json.dumps(record).encode())])
    (found,) = InterleavedTarSource((path,)).read(path, images)
    assert show(found, {pictures["A"]: "A"}) == ["A", "t"]


def test_documents_stand_in_the_order_of_their_first_file(read):
    record = {"texts": [None, "t"], "images": ["0.jpg", None]}
    files = [("b.0.jpg", "A"), ("a.json", record), ("a.0.jpg", "B"), ("b.json", record)]
    assert read(files) == [("b", ["A", "t"]), ("a", ["B", "t"])]


def test_only_the_first_images_are_kept_and_the_text_stays(read):
    record = {"texts": [None, "a", None, "b", None], "images": ["0.jpg", None, "1.jpg", None, "2.jpg"]}
    files = [("k.json", record), ("k.0.jpg", "A"), ("k.1.jpg", "B"), ("k.2.jpg", "C")]
    assert read(files, max_images=1) == [("k", ["A", "a", "b"])]
    assert read(files, min_images=4) == [("k", "too_few_images")]


def test_text_after_the_last_image_goes_but_for_what_the_image_stands_before(read):
    record = {"texts": ["a", None, "b", "c"], "images": [None, "0.jpg", None, None]}
    files = [("k.json", record), ("k.0.jpg", "A")]
    assert read(files, text_after_last_image="drop") == [("k", ["a", "A", "b"])]
    files = [("k.json", {"texts": ["a", "b"], "images": [None, None]})]
    assert read(files, text_after_last_image="drop", min_images=0) == [("k", ["a", "b"])]


def test_a_bad_image_rejects_the_document_or_is_left_out_and_counted(read, reader):
    record = {"texts": [None, "a", None], "images": ["0.jpg", None, "1.jpg"]}
    files = [("k.json", record), ("k.0.jpg", b"<html>"), ("k.1.jpg", "B")]
    assert read(files) == [("k", "image_format")]
    assert read(files, bad_image="image") == [("k", ["a", "B"])]
    assert reader.notes["dropped_images"] == 1


PLAIN = {"texts": ["t", None], "images": [None, "0.jpg"]}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("k.json", PLAIN)], "image_missing"),
        ([("k.jpg", "A"), ("k.txt", b"t")], "json_missing"),
        ([("k.cls", b"7")], "json_missing"),
        ([("k.json", PLAIN), ("k.0.jpg", "A"), ("k.0.jpg", "B")], "duplicate_name"),
        ([("k.json", PLAIN), ("k.json", PLAIN), ("k.0.jpg", "A")], "duplicate_name"),
        ([("k.json", b"{"), ("k.0.jpg", "A")], "json_syntax"),
        ([("k.json", b"[]")], "json_type"),
        ([("k.json", b'{"a": 1, "a": 2}')], "json_duplicate_key"),
        ([("k.json", b'{"texts": ["\xff"]}')], "invalid_utf8"),
        ([("k.json", b'{"texts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")], "json_nesting"),
        ([("k.json", {"texts": ["t"]})], "json_type"),
        ([("k.json", PLAIN | {"images": ["0.jpg"]})], "json_type"),
        ([("k.json", PLAIN | {"images": ["0.jpg", "0.jpg"]}), ("k.0.jpg", "A")], "json_type"),
        ([("k.json", PLAIN | {"images": [None, None]})], "json_type"),
        ([("k.json", PLAIN | {"images": [None, 7]})], "json_type"),
        ([("k.json", PLAIN | {"texts": [7, None]})], "json_type"),
        ([("k.json", PLAIN | {"texts": "t"})], "json_type"),
        ([("k.json", PLAIN | {"train": [True]})], "json_type"),
        ([("k.json", PLAIN | {"train": ["yes", True]}), ("k.0.jpg", "A")], "json_type"),
        ([("k.json", PLAIN | {"train": 1})], "json_type"),
        ([("k.json", {"sequence": [3]})], "json_type"),
        ([("k.json", {"sequence": [{"text": "a", "image": "0.jpg"}]})], "json_type"),
        ([("k.json", {"sequence": "a"})], "json_type"),
        ([("k.json", {"texts": ["s"], "images": [], "matched_text_indices": [0]})], "json_type"),
        ([("k.json", PLAIN | {"texts": ["t\x07", None]}), ("k.0.jpg", "A")], "control_character"),
        ([("k.json", PLAIN | {"texts": ["\ud800", None]}), ("k.0.jpg", "A")], "invalid_unicode"),
        ([("k.json", PLAIN | {"texts": ["<image>" * 1_000_000, None]}), ("k.0.jpg", "A")], "text_too_long"),
        ([("k.json", PLAIN | {"images": [None, "../../etc/passwd"]})], "image_missing"),
        ([("k.json", PLAIN | {"images": [None, "/etc/passwd"]})], "image_missing"),
        ([("k.json", {"texts": [None] * 1001, "images": ["0.jpg"] * 1001}), ("k.0.jpg", "A")], "too_many_images"),
        ([("k.json", PLAIN), ("k.0.jpg", b"")], "image_empty"),
        ([("k.json", PLAIN), ("k.0.jpg", b"\xff\xd8" + bytes(2 << 20))], "image_bytes"),
        ([("k.0.txt", b"\xff\xfe"), ("k.1.jpg", "A")], "invalid_utf8"),
    ],
)
def test_a_bad_document_is_rejected_and_its_neighbours_are_intact(read, files, reason):
    def good(key):
        return [(f"{key}.json", PLAIN), (f"{key}.0.jpg", "C")]

    found = read(good("a") + files + good("z"))
    assert found == [("a", ["t", "C"]), ("k", reason), ("z", ["t", "C"])]


def test_too_large_members_are_rejected_unread(read):
    files = [("k.json", PLAIN), ("k.0.jpg", "A")]
    assert read(files, max_record_bytes=10) == [("k", "record_too_long")]
    assert read([("k.0.txt", b"x" * 100), ("k.1.jpg", "A")], text=TextRules(max_characters=10)) == [
        ("k", "text_too_long")
    ]


def test_options_about_matches_need_records_that_have_them(read):
    files = [("k.json", PLAIN), ("k.0.jpg", "A")]
    assert read(files, image_place="after") == [("k", "json_type")]
    assert read(files, min_similarity=0.2) == read(files, assignment="best") == [("k", "json_type")]


def test_a_truncated_tar_keeps_what_is_whole(tmp_path, make_tar, pictures, reader):
    record = json.dumps({"texts": ["t", None], "images": [None, "0.jpg"]}).encode()
    members = [(f"{key}.{name}", data) for key in "ab" for name, data in (("json", record), ("0.jpg", pictures["A"]))]
    path = make_tar(tmp_path / "0.tar", members)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset_data
    path.write_bytes(path.read_bytes()[: last + 100])
    found = list(InterleavedTarSource((path,)).read(path, reader))
    assert [show(one, {pictures["A"]: "A"}) for one in found] == [["t", "A"], "image_missing", "tar_truncated"]
    assert [one.key for one in found] == ["a", "b", None]
