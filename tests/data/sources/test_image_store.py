import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.config import ConfigError, DataError
from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.data.files.join_index import JoinIndex, join_rows, save_join_index
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader, TarImages, index_tar


def reason_of(store, name, url=None) -> str:
    with pytest.raises(RejectError) as caught:
        store.read(name, url)
    return caught.value.reason


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"picture")
    (root / "sub" / "b.jpg").write_bytes(b"other")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return FolderImages(root, max_bytes=100)


def test_files_of_the_folder_are_found_by_relative_path(images):
    assert images.read("a.jpg", None) == b"picture"
    assert images.read("sub/../sub/b.jpg", None) == b"other"


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "/etc/passwd", "a\0b", ".", "..", "sub/.."])
def test_paths_that_leave_the_folder_are_rejected(images, name):
    assert reason_of(images, name) == "image_path"


@pytest.mark.parametrize("root", [".", "../images", "sub/..", "/"])
def test_a_relative_folder_and_the_whole_disk_have_their_images(images, tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path / "images")
    store = FolderImages(Path(root), max_bytes=100)
    name = str(tmp_path / "images" / "a.jpg")[1:] if root == "/" else "a.jpg"
    assert store.read(name, None) == b"picture"
    assert reason_of(store, "/etc/passwd") == "image_path"
    if root != "/":
        assert reason_of(store, "../secret.jpg") == "image_path"


def test_folder_whose_name_begins_alike_is_outside(images, tmp_path):
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "a.jpg").write_bytes(b"x")
    assert reason_of(images, "../images2/a.jpg") == "image_path"


@pytest.mark.parametrize("name", ["none.jpg", "a.jpg/x", "sub", "n" * 5000, "\ud800.jpg", None, ""])
def test_names_without_a_file_are_rejected(images, name):
    assert reason_of(images, name) == "image_missing"


def test_a_url_without_tars_is_said_not_to_be_downloaded(images):
    with pytest.raises(RejectError, match="image_missing: 'https://x/a.jpg': .* URLs of records are not downloaded"):
        images.read("https://x/a.jpg", "https://x/a.jpg")


def test_a_named_pipe_does_not_block(images, tmp_path):
    os.mkfifo(tmp_path / "images" / "pipe")
    assert reason_of(images, "pipe") == "image_missing"


def test_too_large_files_are_rejected_unread(images, tmp_path):
    (tmp_path / "images" / "large").write_bytes(b"x" * 101)
    assert reason_of(images, "large") == "image_bytes"


def test_missing_folder_names_the_option(tmp_path):
    with pytest.raises(ConfigError, match="image folder does not exist .*fix: check --images"):
        FolderImages(tmp_path / "none", max_bytes=1)


@pytest.fixture
def tars(tmp_path, make_tar):
    first = [("001.jpg", b"one"), ("001.json", json.dumps({"url": "http://x/1"}).encode()), ("cat.png", b"cat")]
    second = [("x/002.jpg", b"two"), ("002.json", b"not json"), ("y/cat.png", b"another cat"), ("z.txt", b"")]
    paths = (make_tar(tmp_path / "0.tar", first), make_tar(tmp_path / "1.tar", second))
    save_join_index([index_tar(path, number) for number, path in enumerate(paths)], tmp_path / "index")
    return TarImages(paths, tmp_path / "index", max_bytes=10)


def test_images_of_tars_are_found_by_url_name_and_key(tars):
    assert tars.read(None, "http://x/1") == b"one"
    assert tars.read("001.jpg", None) == b"one"
    assert tars.read("some/folder/002.jpg", "http://unknown") == b"two"
    assert tars.read("002", None) == b"two"
    assert tars.read("002.webp", None) == b"two"


def test_image_that_no_tar_has_is_rejected(tars):
    assert reason_of(tars, "none.jpg", "http://x/9") == "image_missing"
    assert reason_of(tars, None) == "image_missing"


def test_a_json_that_cannot_be_read_is_named(tmp_path, make_tar, caplog):
    path = make_tar(tmp_path / "0.tar", [("0.jpg", b"x"), ("0.json", b"{"), ("1.jpg", b"y")])
    assert len(index_tar(path, 0)) == 4  # name and key of both
    assert "0.tar: 1 .json files cannot be read, so their images have no URL, 0.json: json_syntax" in caplog.text


def test_name_of_several_images_is_rejected_not_guessed(tars):
    assert reason_of(tars, "cat.png") == "image_ambiguous"


def test_too_large_image_of_a_tar_is_rejected_unread(tars, tmp_path):
    small = TarImages((tmp_path / "0.tar", tmp_path / "1.tar"), tmp_path / "index", max_bytes=2)
    assert reason_of(small, "001.jpg") == "image_bytes"


def test_many_tars_are_read_with_few_open_files(tmp_path, make_tar):
    paths = tuple(make_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", b"%d" % i)]) for i in range(80))
    save_join_index([index_tar(path, number) for number, path in enumerate(paths)], tmp_path / "index")
    store = TarImages(paths, tmp_path / "index", max_bytes=10)
    before = len(os.listdir("/proc/self/fd"))
    assert [store.read(f"{i}.jpg", None) for i in range(80)] == [b"%d" % i for i in range(80)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_join_index_finds_all_rows_of_a_text_in_order(tmp_path):
    texts = ["a", "b", "a", "c", "a"]
    parts = [join_rows(texts, np.arange(5)), join_rows(["a"], np.array([9]))]
    save_join_index(parts, tmp_path / "index")
    index = JoinIndex(tmp_path / "index")
    assert [index.find(text).tolist() for text in ("a", "b", "z")] == [[0, 2, 4, 9], [1], []]


def test_reader_checks_counts_and_shrinks(make_image):
    reader = ImageReader(None, ImageRules(resize_shorter_side=20))
    image = reader.check(make_image(90, 60))
    assert len(image.data) < len(make_image(90, 60))
    assert image.size == (30, 20)
    assert reader.notes["shrunk_images"] == 1
    with pytest.raises(RejectError, match="image_format"):
        reader.check(b"text")


def test_corpus_that_names_files_needs_a_place_to_look():
    with pytest.raises(DataError, match="say where they are with --images"):
        ImageReader(None, ImageRules()).find("a.jpg")
