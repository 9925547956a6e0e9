"""Where the images of a corpus are: a folder, local or in an object store, or tars searched by name or URL."""

import base64
import logging
import os
import posixpath
import stat
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_vlm.config import ConfigError, DataError
from megatron_vlm.config.prepare import MAX_RECORD_BYTES, ImageRules
from megatron_vlm.data.documents import Image
from megatron_vlm.data.files.join_index import JoinIndex, join_rows
from megatron_vlm.data.files.locations import Location, RemoteFile
from megatron_vlm.data.files.records import parse_record
from megatron_vlm.data.files.remote import DeniedError, RemoteStore
from megatron_vlm.data.files.tars import Member, TarReader, find_image, group_members, list_members
from megatron_vlm.data.images.checking import check_image, shrink_image
from megatron_vlm.data.rejects import RejectError

logger = logging.getLogger(__name__)

_PLACE_DTYPE = np.dtype([("tar", "<u4"), ("size", "<u4"), ("offset", "<u8")])
_MAX_SIZE = (1 << 32) - 1
_MAX_OPEN_TARS = 64
DATA_URI = "data:"
"""Start of an image that is given as a URI."""


class ImageStore(Protocol):
    """Finds image files."""

    def read(self, name: str | None, url: str | None) -> bytes:
        """Return the file of an image.

        Raises:
            RejectError: image_missing, image_denied, image_path, image_ambiguous or image_bytes.
        """


class FolderImages:
    """Images in a folder, by path relative to it.

    Args:
        root: the folder; paths that lead out of it are rejected.
        max_bytes: largest file that is read.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        if not root.is_dir():
            raise ConfigError("image folder does not exist", where=str(root), fix="check --images")
        self._root, self._max_bytes = os.path.join(os.path.realpath(root), ""), max_bytes

    def read(self, name: str | None, url: str | None) -> bytes:
        """Return the file named `name`; the URL is not used."""
        if not name:
            raise RejectError("image_missing", "the record names no image file")
        path = os.path.normpath(os.path.join(self._root, name))
        if os.path.isabs(name) or "\0" in name or not path.startswith(self._root):
            raise RejectError("image_path", f"{name[:200]!r} leaves the image folder")
        try:
            # Without O_NONBLOCK, a named pipe in the folder would block forever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", error)
            if "://" in name:
                why = "it is not a file of the image folder, and URLs of records are not downloaded; give their tars"
            raise RejectError("image_missing", f"{name[:200]!r}: {why}") from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise RejectError("image_missing", f"{name[:200]!r} is not a file")
            if found.st_size > self._max_bytes:
                raise RejectError("image_bytes", f"{found.st_size} bytes, at most {self._max_bytes} are allowed")
            return os.pread(descriptor, found.st_size, 0)
        finally:
            os.close(descriptor)


class RemoteImages:
    """Images under a URL, by path relative to it.

    Args:
        root: the folder; paths that lead out of it are rejected.
        max_bytes: largest object that is read.
    """

    def __init__(self, root: RemoteFile, *, max_bytes: int) -> None:
        self._store, self._max_bytes = RemoteStore(root), max_bytes
        self._is_web = root.is_web

    def read(self, name: str | None, url: str | None) -> bytes:
        """Return the object named `name`; the URL of the record is not used."""
        if not name:
            raise RejectError("image_missing", "the record names no image file")
        path = posixpath.normpath(name.replace("\0", ".."))
        if path.startswith("/") or path in (".", "..") or path.startswith("../") or "\0" in name:
            raise RejectError("image_path", f"{name[:200]!r} leaves the image folder")
        try:
            data = self._store.read_inside(path, self._max_bytes)
        except FileNotFoundError:
            raise RejectError("image_missing", f"{name[:200]!r}: No such file or directory") from None
        except DeniedError as error:
            if not self._is_web:
                raise
            # Public buckets answer so over the web if the file does not exist, but also if a signed URL has expired.
            raise RejectError("image_denied", f"{name[:200]!r}: {error.what}") from None
        if isinstance(data, int):
            raise RejectError("image_bytes", f"{data} bytes, at most {self._max_bytes} are allowed")
        return data


class TarImages:
    """Images in tars, by URL (the .json that img2dataset writes beside each), member name or key.

    Args:
        tars: the tar files, in the order in which they were indexed.
        index: folder written by `save_join_index`; mapped, so that all workers share its memory.
        max_bytes: largest image that is read.
    """

    def __init__(self, tars: tuple[Location, ...], index: Path, *, max_bytes: int) -> None:
        self._tars, self._max_bytes = tars, max_bytes
        self._index = JoinIndex(index)
        self._readers: dict[int, TarReader] = {}

    def read(self, name: str | None, url: str | None) -> bytes:
        """Return the image with this URL, or else with this name."""
        entry = self._find("url:" + url, unique=False) if url else None
        # The end of a URL is not a name: it would match "1.jpg" of any other site.
        name = None if name and "://" in name else name
        if entry is None and name:
            entry = self._find("name:" + name.rpartition("/")[2], unique=True)
        if entry is None and name:
            entry = self._find("key:" + Member(name, 0, 0).key.rpartition("/")[2], unique=True)
        if entry is None:
            raise RejectError("image_missing", f"no tar has an image of name {name!r} or URL {url!r}"[:300])
        reader = self._reader(int(entry["tar"]))
        return reader.read(Member("", int(entry["offset"]), int(entry["size"])), self._max_bytes, "image_bytes")

    def _find(self, text: str, *, unique: bool) -> np.void | None:
        found = self._index.find(text)
        if unique and len(found) > 1:
            raise RejectError("image_ambiguous", f"several images in the tars are named {text[:200]!r}")
        return found[0] if len(found) else None

    def _reader(self, number: int) -> TarReader:
        reader = self._readers.get(number)
        if reader is None:
            if len(self._readers) >= _MAX_OPEN_TARS:
                self._readers.pop(next(iter(self._readers))).__exit__()
            reader = self._readers[number] = TarReader(self._tars[number])
        return reader


def index_tar(path: Location, number: int) -> np.ndarray:
    """List the images of one tar, up to a damaged place, under URL, name and key; `number` is its place among tars."""
    names: list[str] = []
    rows: list[tuple[int, int, int]] = []
    damaged: list[str] = []
    with TarReader(path) as tar:
        for key, group in group_members(list_members(tar)[0]).items():
            member = find_image(group)
            if member is None:
                continue
            own = ["key:" + key.rpartition("/")[2], "name:" + member.name.rpartition("/")[2]]
            try:
                own += _url_names(tar, group.get("json"))
            except RejectError as error:
                damaged.append(f"{key[:200]}.json: {error}")
            names += own
            rows += [(number, min(member.size, _MAX_SIZE), member.offset)] * len(own)
    if damaged:
        what = f"{len(damaged)} .json files cannot be read, so their images have no URL"
        logger.warning("%s: %s, %s first", path, what, damaged[0])
    return join_rows(names, np.array(rows, dtype=_PLACE_DTYPE))


class ImageReader:
    """Reads and checks images, shrinks them if the rules say so, and counts notes for the manifest.

    Args:
        store: finds images by name; None for corpora that contain their images.
        rules: which images are accepted.
    """

    def __init__(self, store: ImageStore | None, rules: ImageRules) -> None:
        self._store, self._rules = store, rules
        self.max_bytes = rules.max_bytes
        self.notes = Counter(animated_images=0, shrunk_images=0)

    def find(self, name: str | None, url: str | None = None) -> Image:
        """Return the checked image with this name or URL; RejectError if it is missing or not accepted."""
        if self._store is None:
            raise DataError("the corpus names image files", fix="say where they are with --images")
        return self.check(self._store.read(name, url))

    def check(self, data: bytes) -> Image:
        """Return the checked image, shrunk if the rules say so; RejectError if it is not accepted."""
        facts = check_image(data, self._rules)
        self.notes["animated_images"] += facts.animated
        image = shrink_image(data, facts, self._rules)
        self.notes["shrunk_images"] += image.data is not data
        return image


def _url_names(tar: TarReader, member: Member | None) -> list[str]:
    url = parse_record(tar.read(member, MAX_RECORD_BYTES, "record_too_long")).get("url") if member else None
    return ["url:" + url] if isinstance(url, str) else []


def decode_base64(text: Any, name: str) -> bytes:
    """Return the bytes of base64 text, with or without line breaks or a `data:` head, or raise a RejectError."""
    if not isinstance(text, str):
        raise RejectError("json_type", f"{name} is {type(text).__name__}, not base64 text")
    if text.startswith(DATA_URI):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise RejectError("image_base64", f"{len(text)} characters of {name} are not base64") from None
