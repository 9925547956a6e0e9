"""URLs of a web server, a real one in a thread: signed, with ranges, and shy about what it has."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import StorageError
from megatron_vlm.data.files import remote
from megatron_vlm.data.files.locations import RemoteFile, list_location
from megatron_vlm.data.files.tars import TarReader
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import RemoteImages

SECRET = "X-Sig=ab/cd"


class _Server(ThreadingHTTPServer):
    """Serves `files` to those who send the query `SECRET`; answers anything else with `refusal`."""

    refusal = 403
    files: dict[str, bytes]
    with_ranges = True


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:  # noqa: N802
        self.send_error(405)  # what is signed for GET is not for HEAD

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        content = self.server.files.get(url.path)
        if content is None or url.query != SECRET:
            self.send_error(self.server.refusal)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.with_ranges else None
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(content) - 1)
        self.send_response(206 if wanted else 200)
        piece = content[first : last + 1]
        self.send_header("Content-Length", str(len(piece)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "_WAIT_SECONDS", (0.0,))
    with _Server(("127.0.0.1", 0), _Handler) as running:
        running.files = {}
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def url(server):
    """The URL of a file, signed: url("a.tar")."""
    return lambda name: f"http://127.0.0.1:{server.server_port}/{name}?{SECRET}"


@pytest.mark.parametrize("with_ranges", [True, False])
def test_a_tar_of_a_server_has_the_members_of_the_file(server, url, make_tar, tmp_path, with_ranges):
    server.with_ranges = with_ranges
    path = make_tar(tmp_path / "a.tar", [(f"{n}.jpg", bytes([n]) * n * 100) for n in range(40)])
    server.files["/x/a.tar"] = path.read_bytes()
    found = []
    for location in (path, *list_location(RemoteFile(url("x/a.tar")), (".tar",))):
        with TarReader(location) as tar:
            found.append([(member.name, tar.read(member, 1 << 20, "")) for member in tar.members()])
    assert found[0] == found[1]


@pytest.mark.parametrize("refusal", [401, 403, 404, 410])
def test_a_file_that_a_server_refuses_or_lacks_is_not_there(server, url, refusal):
    server.refusal = refusal
    server.files["/a.tar"] = b"x"
    assert RemoteFile(url("a.tar")).is_file()
    assert not RemoteFile(url("a.tar")).with_suffix(".parquet").is_file()


def test_a_server_that_fails_is_no_missing_file(server, url):
    server.refusal = 500
    with pytest.raises(StorageError, match="URL cannot be read, tried 2 times: HTTP 500 Internal Server Error"):
        RemoteFile(url("a.tar")).is_file()


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("https://h/x/0.tar?X-Sig=ab/cd", "https://h/x/0.parquet"),
        ("https://h/x/0.tar?u=http://y/z.w", "https://h/x/0.parquet"),
        ("zip://x/0.tar::https://h/c.zip?X-Sig=ab/cd", "zip://x/0.parquet::https://h/c.zip?X-Sig=ab/cd"),
    ],
)
def test_slashes_of_a_query_are_no_folders(name, beside):
    file = RemoteFile(name)
    assert file.with_suffix(".parquet").url == beside
    assert (file.name, file.suffix) == ("0.tar", ".tar")
    assert not RemoteFile("https://h/0.tar?X-Sig=a*b[").is_pattern


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:word@h/a.tar?{SECRET}",
        "https://word@h/a.tar?u=http://x/word",
        "ftp://me:pass@word@h/a.tar",
        "zip://a::https://h/a.zip?word::file:///b",
    ],
)
def test_neither_query_nor_password_is_shown(text):
    file = RemoteFile(text)
    assert not re.search("word|X-Sig|ab/cd", f"{file} {file.path}")


def test_a_user_that_is_part_of_an_address_is_shown():
    assert str(RemoteFile("abfs://container@account/a.tar")) == "abfs://container@account/a.tar"


@pytest.mark.parametrize("refusal", [403, 404, 500])
@pytest.mark.parametrize("action", ["list", "read"])
def test_no_message_has_the_signature(server, url, refusal, action):
    server.refusal = refusal
    wrong = RemoteFile(url("secret.jsonl").replace("cd", "ef"), size=None if action == "list" else 10)
    with pytest.raises(Exception, match="secret.jsonl") as caught:
        list_location(wrong, (".jsonl",)) if action == "list" else wrong.open("rb").read()
    assert caught.value.exit_code
    assert not re.search("X-Sig|ab/", str(caught.value))


def test_what_a_driver_says_is_told_without_secrets(monkeypatch, bucket):
    said = f"no: https://me:pw@h/a/b?{SECRET}&c=d, URL('http://h/?{SECRET}') /a.tar?{SECRET} me:pw@h ftp://me@h/x"

    def info(self, path, **options):
        raise PermissionError(said)

    monkeypatch.setattr(type(bucket), "info", info)
    with pytest.raises(StorageError) as caught:
        list_location(RemoteFile("memory:///a"), ())
    assert "access denied: PermissionError no: https://h" in str(caught.value)
    assert not re.search("X-Sig|pw|me@|ab/", str(caught.value))


def test_images_of_a_server_are_found_and_those_it_refuses_are_rejected(server, url):
    server.files["/images/sub/a.jpg"] = b"picture"
    images = RemoteImages(RemoteFile(url("images")), max_bytes=100)
    assert images.read("sub/a.jpg", None) == b"picture"
    with pytest.raises(RejectError, match="image_denied: 'b.jpg': access denied: HTTP 403"):
        images.read("b.jpg", None)


def test_images_that_a_bucket_refuses_stop_the_preparation(monkeypatch, bucket):
    images = RemoteImages(RemoteFile("memory:///images"), max_bytes=100)

    def info(self, path, **options):
        raise PermissionError("expired")

    monkeypatch.setattr(type(bucket), "info", info)
    with pytest.raises(StorageError, match="access denied: PermissionError expired"):
        images.read("b.jpg", None)


def test_signed_tars_are_prepared_whatever_the_server_says_of_their_neighbours(
    server, url, coyo, tokenizer_path, tmp_path
):
    for path in coyo.iterdir():
        server.files[f"/coyo/{path.name}"] = path.read_bytes()
    names = ["00000.tar", "00001.tar"]
    common = ["--tokenizer", str(tokenizer_path), "--workers", "1"]
    for output, inputs in (
        ("files", [f"{coyo}/{name}" for name in names]),
        ("urls", [url(f"coyo/{n}") for n in names]),
    ):
        assert main(["prepare", "pairs", "--input", *inputs, "--output", str(tmp_path / output), *common]) == 0
    assert content(tmp_path / "files") == content(tmp_path / "urls")
    assert len(json.loads((tmp_path / "urls" / "manifest.json").read_text())["options"]["inputs"]) == 2


def test_parts_keep_no_signature_and_are_merged(server, url, coyo, tokenizer_path, tmp_path):
    for path in coyo.iterdir():
        server.files[f"/coyo/{path.name}"] = path.read_bytes()
    inputs = [url(f"coyo/{name}") for name in ("00000.tar", "00001.tar")]
    command = ["prepare", "pairs", "--input", *inputs, "--tokenizer", str(tokenizer_path), "--workers", "1", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    for part in ("1/2", "2/2"):
        assert main([*command, str(tmp_path / "d"), "--part", part]) == 0
    parts = sorted(tmp_path.glob("d.part-*"))
    assert not any(b"X-Sig" in path.read_bytes() for part in parts for path in part.iterdir())
    assert main(["data", "merge", str(tmp_path / "d"), *map(str, parts)]) == 0
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bucket_that_lets_read_but_not_list_is_prepared(coyo, bucket, monkeypatch, tokenizer_path, tmp_path):
    original = type(bucket).info

    def info(self, path, **options):
        found = original(self, path, **options) if self.exists_as_file(path) else None
        if found is None:
            raise PermissionError("Forbidden")
        return found

    monkeypatch.setattr(type(bucket), "exists_as_file", lambda self, path: path in self.store, raising=False)
    monkeypatch.setattr(type(bucket), "info", info)
    bucket.pipe("/coyo/00000.tar", (coyo / "00000.tar").read_bytes())
    command = ["prepare", "pairs", "--input", "memory://coyo/00000.tar", "--output", str(tmp_path / "d")]
    assert main([*command, "--tokenizer", str(tokenizer_path), "--workers", "1"]) == 0
