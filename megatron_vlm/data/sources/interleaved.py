"""MMC4-like corpora: sentences and images matched to them, one JSON record a document."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.data.documents import Document, Image, RejectError, Segment, Text, TextRules, clean_text
from megatron_vlm.data.sources.assignment import reassign
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.locations import Location
from megatron_vlm.data.sources.records import MAX_RECORD_BYTES, field, read_records
from megatron_vlm.data.sources.source import Found, ReadContext, key_of

_MAX_LISTED_IMAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedRules:
    """How a record becomes a document; the defaults are those of the VILA paper and its code."""

    max_images: int = 6
    """Images of a document; the first ones listed in the record are kept."""
    min_images: int = 1
    """Documents with fewer images are rejected."""
    bad_image: Literal["document", "image"] = "document"
    """What is left out for an image that is missing or damaged."""
    min_similarity: float | None = None
    """Images whose `matched_sim` is lower are left out; None keeps all."""
    assignment: Literal["listed", "linear", "best"] = "listed"
    """The sentence of an image: the record's `matched_text_index`, or computed from its `similarity_matrix` for all
    listed images, before any is left out; each with a sentence of its own, or each with its most similar one."""
    text: TextRules = TextRules()
    max_record_bytes: int = MAX_RECORD_BYTES


@dataclass(frozen=True, slots=True)
class InterleavedSource:
    """JSON lines as MMC4 publishes them.

    A record has `text_list` and `image_info`, each entry of it with `matched_text_index` and `image_name`, `raw_url`
    or `image_base64`. Each image stands directly before its sentence; several of one sentence in their listed order.

    Source: allenai/mmc4, README; VILA, llava/data/dataset.py, LazyMMC4Dataset.
    """

    inputs: tuple[Location, ...]
    rules: InterleavedRules = InterleavedRules()

    def read(self, path: Location, context: ReadContext) -> Iterator[Found]:
        """Yield the documents of one file, sentences and images not yet joined."""
        for line, value in read_records(path, max_bytes=self.rules.max_record_bytes):
            if isinstance(value, RejectError):
                yield Found(line, None, value)
                continue
            key = key_of(value.get("url"))
            try:
                yield Found(line, key, self._document(value, key or "", context.images))
            except RejectError as error:
                yield Found(line, key, error)

    def _document(self, record: dict[str, Any], key: str, images: ImageReader) -> Document:
        sentences = field(record, "text_list", list)
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise RejectError("json_type", "text_list has an entry that is no text")
        if sum(map(len, sentences)) > self.rules.text.max_characters:
            raise RejectError("text_too_long", f"more than {self.rules.text.max_characters} characters")
        infos = field(record, "image_info", list)
        if len(infos) > _MAX_LISTED_IMAGES:
            raise RejectError("too_many_images", f"{len(infos)} images, at most {_MAX_LISTED_IMAGES} are read")
        if self.rules.assignment != "listed":
            matched = reassign(record, len(sentences), self.rules.assignment)
            if unmatched := len(infos) - len(matched):
                images.notes["unmatched_images"] = images.notes.get("unmatched_images", 0) + unmatched
            infos = matched
        placed = self._place(infos, len(sentences), images)
        if len(placed) < self.rules.min_images:
            raise RejectError("too_few_images", f"{len(placed)} images, at least {self.rules.min_images} are wanted")
        segments: list[Segment] = []
        for number, sentence in enumerate(sentences):
            segments += [image for index, image in placed if index == number]
            segments.append(Text(clean_text(sentence, self.rules.text)))
        return Document(tuple(segments), key=key)

    def _place(self, infos: list[Any], num_sentences: int, images: ImageReader) -> list[tuple[int, Image]]:
        """Return the images that are kept, each with the number of its sentence."""
        placed: list[tuple[int, Image]] = []
        for info in infos:
            if not isinstance(info, dict):
                raise RejectError("json_type", "image_info has an entry that is no object")
            index = field(info, "matched_text_index", int)
            if not 0 <= index < num_sentences:
                raise RejectError("json_type", f"matched_text_index {index} of {num_sentences} sentences")
            if self._is_dissimilar(info):
                images.notes["dissimilar_images"] = images.notes.get("dissimilar_images", 0) + 1
                continue
            try:
                placed.append((index, Image(_find_image(info, images))))
            except RejectError:
                if self.rules.bad_image == "document":
                    raise
                images.notes["dropped_images"] = images.notes.get("dropped_images", 0) + 1
        return placed[: self.rules.max_images]

    def _is_dissimilar(self, info: dict[str, Any]) -> bool:
        if self.rules.min_similarity is None:
            return False
        return field(info, "matched_sim", (float, int)) < self.rules.min_similarity


def _find_image(info: dict[str, Any], images: ImageReader) -> bytes:
    if "image_base64" in info:
        text = field(info, "image_base64", str)
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            raise RejectError("image_base64", f"{len(text)} characters are not base64") from None
        return images.check(data)
    name, url = info.get("image_name"), info.get("raw_url")
    return images.find(name if isinstance(name, str) else None, url if isinstance(url, str) else None)
