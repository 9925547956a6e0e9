import argparse
from pathlib import Path

import pytest

from megatron_vlm.cli.values import (
    local_path,
    location,
    new_file,
    new_folder,
    new_name,
    number,
    positive,
    seed,
    whole_number,
)


def test_numbers_within_bounds_are_taken():
    assert (positive("1"), whole_number(0)("0"), whole_number(1, 95)("95")) == (1, 0, 95)
    assert (number()("-0.5"), number(1)("1e1")) == (-0.5, 10.0)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (positive, "0", "0 is below 1"),
        (whole_number(0), "-1", "-1 is below 0"),
        (whole_number(1, 95), "96", "96 is not from 1 to 95"),
        (seed, "-1", "-1 is not from 0 to 9223372036854775807"),
        (positive, "1.5", "'1.5' is not a whole number"),
        (number(), "nan", "'nan' is not a finite number"),
        (number(), "-inf", "'-inf' is not a finite number"),
        (number(), "wide", "'wide' is not a number"),
        (number(1), "0.5", "0.5 is below 1"),
        (number(0, 1), "1.5", "1.5 is above 1"),
    ],
)
def test_other_numbers_are_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def test_paths_of_the_file_system_are_taken(tmp_path):
    assert local_path("a::b/c:d".replace("::", "_")) == Path("a_b/c:d")
    assert new_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert new_file(str(tmp_path / "page.html")) == tmp_path / "page.html"


@pytest.mark.parametrize("kind", [local_path, new_folder, new_file])
@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///tmp/x", "zip::s3://bucket/x"])
def test_a_url_is_refused(kind, url):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{url} is a URL"):
        kind(url)


def test_a_url_that_is_refused_is_shown_without_its_secrets():
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        local_path("https://me:word@host/x?X-Sig=word")
    assert str(caught.value).startswith("https://host/x is a URL")


@pytest.mark.parametrize("below", ["", "shards"])
def test_a_file_where_a_folder_is_wanted_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match=r"file is a file, not a folder"):
        new_folder(str(tmp_path / "file" / below))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file"):
        new_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="none does not exist; create it first"):
        new_file(str(tmp_path / "none" / "page.html"))


@pytest.mark.parametrize("kind", [local_path, location, new_folder, new_file, new_name])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_does_not_stand_for_this_folder(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="it is empty; name a file or a folder"):
        kind(text)


@pytest.mark.parametrize("kind", [local_path, location, new_folder, new_file, new_name])
def test_a_name_that_no_file_system_takes_is_a_wrong_command_line(kind):
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be used: File name too long"):
        kind("a" * 300)


@pytest.mark.parametrize("kind", [new_folder, new_name])
def test_a_folder_without_a_name_has_that_which_it_is_found_under(kind, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert kind(".") == tmp_path / "here" / "below"
    assert kind("..") == tmp_path / "here"
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written to"):
        kind("/")


def test_a_name_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file, not a folder"):
        new_name(str(tmp_path / "file" / "part"))
    assert new_name(str(tmp_path / "file")) == tmp_path / "file"
    assert new_name("/out") == Path("/out")
