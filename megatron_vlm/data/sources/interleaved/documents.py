"""From a record of an interleaved corpus to a document, with images matched to sentences or both in reading order."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.data.documents import Document, Image, Segment, Text, clean_text
from megatron_vlm.data.files.records import field
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import ImageReader, decode_base64
from megatron_vlm.data.sources.interleaved.assignment import reassign
from megatron_vlm.data.sources.source import check_length

_MAX_LISTED_IMAGES = 1000

FindImage = Callable[[dict[str, Any]], Image]
"""Returns the checked image of an entry of `image_info`."""
LoadImage = Callable[[], Image]
"""Returns one checked image, or raises RejectError."""


def matched_document(
    record: dict[str, Any], key: str, rules: InterleavedRules, images: ImageReader, find: FindImage
) -> Document:
    """Read a record in the form of MMC4: each image is placed directly before or after its sentence.

    Args:
        record: has `text_list` and `image_info`, whose entries have `matched_text_index`. Several images of one
            sentence keep their listed order.
        key: key of the document.
        rules: what is accepted.
        images: counts what is left out.
        find: finds the image of an entry.

    Raises:
        RejectError: the record or one of its images is not accepted.

    Source: VILA, llava/data/dataset.py, LazyMMC4Dataset.
    """
    sentences = field(record, "text_list", list)
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise RejectError("json_type", "text_list has an entry that is not text")
    infos = field(record, "image_info", list)
    _check_amount(sum(map(len, sentences)), len(infos), rules)
    if rules.assignment != "listed":
        matched = reassign(record, len(sentences), rules.assignment)
        images.notes["unmatched_images"] += len(infos) - len(matched)
        infos = matched
    taker = _ImageTaker(rules, images)
    placed: dict[int, list[Segment]] = {}
    indices = [_matched_index(info, len(sentences)) for info in infos]
    order = list(zip(infos, indices, strict=True))
    if rules.keep_images == "first-in-text":
        order.sort(key=lambda entry: entry[1])
    for info, index in order:
        if rules.min_similarity is not None and field(info, "matched_sim", (float, int)) < rules.min_similarity:
            images.notes["dissimilar_images"] += 1
        elif (image := taker.take(functools.partial(find, info))) is not None:
            placed.setdefault(index, []).append(image)
    taker.check_enough()
    segments: list[Segment] = []
    for number, sentence in enumerate(sentences):
        text = Text(clean_text(sentence, rules.text))
        own = placed.get(number, ())
        segments += [*own, text] if rules.image_place == "before" else [text, *own]
    return Document(tuple(_without_tail(segments, rules)), key=key)


def placed_document(
    places: Sequence[Text | LoadImage], key: str, rules: InterleavedRules, images: ImageReader
) -> Document:
    """Make a document of `places` in reading order; of too many images, the first ones are kept.

    Raises:
        RejectError: a text or an image is not accepted, or there are too few images.
    """
    if rules.want_matches:
        raise RejectError("json_type", "the record does not match images and sentences, which the options need")
    texts = [place for place in places if isinstance(place, Text)]
    _check_amount(sum(len(text.text) for text in texts), len(places) - len(texts), rules)
    taker = _ImageTaker(rules, images)
    segments: list[Segment] = []
    for place in places:
        if isinstance(place, Text):
            segments.append(Text(clean_text(place.text, rules.text), place.train))
        elif (image := taker.take(place)) is not None:
            segments.append(image)
    taker.check_enough()
    return Document(tuple(_without_tail(segments, rules)), key=key)


def pair_up(texts: list[Any], images: list[Any], train: list[Any] | None = None) -> list[Text | Any]:
    """Merge two parallel lists, of which exactly one has an entry at each place.

    Each place becomes a `Text`, or the given representation of the image. `train` says of each place whether its text
    is trained; None: all text is.

    Raises:
        RejectError: the lists differ in length, or a place has both, neither or another type.
    """
    if len(texts) != len(images) or (train is not None and len(train) != len(texts)):
        lengths = f"{len(texts)} texts, {len(images)} images" + (f", {len(train)} train" if train is not None else "")
        raise RejectError("json_type", f"lists differ in length: {lengths}")
    places: list[Text | Any] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise RejectError("json_type", f"place {number} has {'neither' if text is None else 'both'} text and image")
        if text is not None and not isinstance(text, str):
            raise RejectError("json_type", f"place {number} has a text that is {type(text).__name__}")
        trained = True if train is None else train[number]
        if text is not None and not isinstance(trained, bool):
            raise RejectError("json_type", f"train has {trained!r} at place {number}"[:200])
        places.append(image if text is None else Text(text, trained))
    return places


def find_listed_image(info: dict[str, Any], images: ImageReader) -> Image:
    """Return the image of an entry of `image_info`, which holds base64, a file name or a URL."""
    if "image_base64" in info:
        return images.check(decode_base64(info["image_base64"], "image_base64"))
    name, url = info.get("image_name"), info.get("raw_url")
    return images.find(name if isinstance(name, str) else None, url if isinstance(url, str) else None)


class _ImageTaker:
    """Takes the images of one document by the rules; reads all of them, so that a bad one is found at any place."""

    def __init__(self, rules: InterleavedRules, images: ImageReader) -> None:
        self._rules, self._images = rules, images
        self._num_taken = 0

    def take(self, load: LoadImage) -> Image | None:
        """Return the image, or None if it is left out."""
        try:
            image = load()
        except RejectError:
            if self._rules.bad_image == "document":
                raise
            self._images.notes["dropped_images"] += 1
            return None
        if self._num_taken == self._rules.max_images:
            self._images.notes["images_beyond_max_images"] += 1
            return None
        self._num_taken += 1
        return image

    def check_enough(self) -> None:
        if self._num_taken < self._rules.min_images:
            detail = f"{self._num_taken} images, at least {self._rules.min_images} are needed"
            raise RejectError("too_few_images", detail)


def _matched_index(info: Any, num_sentences: int) -> int:
    if not isinstance(info, dict):
        raise RejectError("json_type", "image_info has an entry that is not an object")
    index = field(info, "matched_text_index", int)
    if not 0 <= index < num_sentences:
        raise RejectError("json_type", f"matched_text_index {index} of {num_sentences} sentences")
    return index


def _without_tail(segments: list[Segment], rules: InterleavedRules) -> list[Segment]:
    """Drop the text after the last image if the rules say so."""
    last = max((number for number, segment in enumerate(segments) if isinstance(segment, Image)), default=None)
    if rules.text_after_last_image == "keep" or last is None:
        return segments
    # The sentence after an image belongs to the image.
    return segments[: last + (2 if rules.image_place == "before" else 1)]


def _check_amount(num_characters: int, num_images: int, rules: InterleavedRules) -> None:
    check_length(num_characters, rules.text)
    if num_images > _MAX_LISTED_IMAGES:
        raise RejectError("too_many_images", f"{num_images} images, at most {_MAX_LISTED_IMAGES} are read")
