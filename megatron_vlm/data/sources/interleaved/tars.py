"""Interleaved documents in tars: WebDataset, Energon's InterleavedSample, MMC4 records with their images."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.documents import Document, Image, Text
from megatron_vlm.data.files.locations import Location
from megatron_vlm.data.files.records import field
from megatron_vlm.data.files.tars import IMAGE_EXTENSIONS, Member
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.interleaved.documents import (
    LoadImage,
    find_listed_image,
    matched_document,
    pair_up,
    placed_document,
)
from megatron_vlm.data.sources.source import Found
from megatron_vlm.data.sources.tar_samples import TarSample, read_samples

_TEXT_EXTENSION = "txt"
_NUMBERED = re.compile(rf"(?:(\d+)\.)?({'|'.join((*IMAGE_EXTENSIONS, _TEXT_EXTENSION))})")


@dataclass(frozen=True, slots=True)
class InterleavedTarSource:
    """Tars in which the files of a document share a key, the name up to its first dot.

    A key is one of:

    - `KEY.json` with `texts` and `images`, two lists of which exactly one has an entry at each place; an image is the
      file `KEY.<image>`, for example "0.jpg". A list `train` may say which texts are trained, as `data export` writes
      it.
    - `KEY.json` with `sequence`, one list: `{"text": ...}` or `{"image": ...}`, or a string, which is an image if a
      file of the key has this name.
    - `KEY.json` as MMC4 has it, `text_list` and `image_info`, images as files of the key, base64 or in --images;
      `texts`, `images` and `matched_text_indices` are another notation for it.
    - No `KEY.json`: `KEY.0.txt`, `KEY.1.jpg`, ..., in the order of their numbers, images before text of one number.

    Documents are in the order of their first files.

    Source: Megatron-Energon, docs, "Interleaved Data and Arbitrary Image Count"; MINT-1T; OpenFlamingo's MMC4 tars.
    """

    inputs: tuple[Location, ...]
    rules: InterleavedRules = InterleavedRules()

    def read(self, path: Location, images: ImageReader) -> Iterator[Found]:
        """Yield the documents of one tar."""
        return read_samples(path, lambda sample: _Reader(sample, self.rules, images).document())


class _Reader:
    """Reads the files of one key."""

    def __init__(self, sample: TarSample, rules: InterleavedRules, images: ImageReader) -> None:
        self._sample, self._rules, self._images = sample, rules, images
        self._key, self._group = sample.key, sample.files

    def document(self) -> Document:
        """Read the files in any of the forms."""
        record = self._sample.read_record(self._rules.max_record_bytes)
        if record is None:
            return self._place(self._numbered())
        if "image_info" in record or "matched_text_indices" in record:
            return matched_document(_as_mmc4(record), self._key, self._rules, self._images, self._find_listed)
        if "sequence" in record:
            return self._place([self._entry(entry) for entry in field(record, "sequence", list)])
        train = field(record, "train", list) if record.get("train") is not None else None
        found = pair_up(field(record, "texts", list), field(record, "images", list), train)
        return self._place([place if isinstance(place, Text) else self._image(place) for place in found])

    def _place(self, places: list[Text | LoadImage]) -> Document:
        return placed_document(places, self._key, self._rules, self._images)

    def _numbered(self) -> list[Text | LoadImage]:
        """Return text and images in the order of the numbers in their names."""
        numbered: list[tuple[int, bool, str]] = []
        for extension in self._group:
            if (match := _NUMBERED.fullmatch(extension)) is None:
                continue
            if match[1] is None:
                raise RejectError("json_missing", f"the key has no .json, and its .{extension} has no number")
            numbered.append((int(match[1][:9]), match[2] == _TEXT_EXTENSION, extension))
        if not numbered:
            raise RejectError("json_missing", f"the key has {', '.join(self._group) or 'nothing'}"[:200])
        return [
            Text(self._sample.read_text(self._group[extension], self._rules.text))
            if is_text
            else self._image(extension)
            for _, is_text, extension in sorted(numbered)
        ]

    def _entry(self, entry: Any) -> Text | LoadImage:
        """Return one entry of `sequence`."""
        if isinstance(entry, dict):
            (place,) = pair_up([entry.get("text")], [entry.get("image")], [entry.get("train", True)])
            return place if isinstance(place, Text) else self._image(place)
        if not isinstance(entry, str):
            raise RejectError("json_type", f"sequence has an entry that is {type(entry).__name__}")
        return Text(entry) if self._member(entry) is None else self._image(entry)

    def _image(self, name: Any) -> LoadImage:
        return functools.partial(self._load, name)

    def _load(self, name: Any) -> Image:
        if not isinstance(name, str):
            raise RejectError("json_type", f"an image is {type(name).__name__}, not a name")
        if (member := self._member(name)) is not None:
            return self._images.check(self._sample.tar.read(member, self._images.max_bytes, "image_bytes"))
        if "://" in name:
            return self._images.find(None, name)
        raise RejectError("image_missing", f"the tar has no file {self._key}.{name}"[:300])

    def _find_listed(self, info: dict[str, Any]) -> Image:
        name = info.get("image_name")
        if isinstance(name, str) and self._member(name) is not None:
            return self._load(name)
        return find_listed_image(info, self._images)

    def _member(self, name: str) -> Member | None:
        """Return the file with this name: the part after the key, or the full name, with or without its folder."""
        if (member := self._group.get(name.lower())) is not None:
            return member
        whole = Member(name, 0, 0)
        return self._group.get(whole.extension) if whole.key in (self._key, self._key.rpartition("/")[2]) else None


def _as_mmc4(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with `texts`, `images` and `matched_text_indices` in MMC4's form; others unchanged."""
    if "image_info" in record:
        return record
    names, indices = field(record, "images", list), field(record, "matched_text_indices", list)
    if len(names) != len(indices):
        raise RejectError("json_type", f"{len(names)} images, {len(indices)} matched_text_indices")
    infos = [{"image_name": name, "matched_text_index": index} for name, index in zip(names, indices, strict=True)]
    return record | {"text_list": field(record, "texts", list), "image_info": infos}
