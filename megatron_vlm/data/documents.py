"""A document: ordered text and images, the form in which every corpus is read before it becomes token ids.

Later stages know nothing about MMC4, COYO or LLaVA. The variants of the paper's ablations are functions from one
document to several.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_vlm.config.prepare import JoinRules, TextRules
from megatron_vlm.data.rejects import RejectError


class Text(NamedTuple):
    """Text; consecutive texts may be sentences that are not joined yet."""

    text: str
    train: bool = True
    """Whether its tokens are targets of the loss."""


class Image(NamedTuple):
    """An image file, checked, and shrunk if the options say so."""

    data: bytes
    size: tuple[int, int] | None = None
    """Width and height of the upright image [pixels]; None if not measured."""


class Control(enum.Enum):
    """A token whose name depends on the tokenizer."""

    BOS = "bos"
    """Nothing with a tokenizer that has none."""
    EOS = "eos"


class Special(NamedTuple):
    """A control token: BOS, EOS, or the one with exactly this name in the vocabulary, e.g. "<|im_end|>"."""

    token: Control | str
    train: bool = True


Segment = Text | Image | Special


@dataclass(frozen=True, slots=True)
class Document:
    """Text, images and control tokens in reading order."""

    segments: tuple[Segment, ...]
    key: str = ""
    """Name of the document in its corpus: a URL, an id or a tar key."""

    @property
    def images(self) -> tuple[Image, ...]:
        """The images in reading order."""
        return tuple(segment for segment in self.segments if isinstance(segment, Image))


PLACEHOLDER = "<image>"
"""Marks the place of an image in the texts of corpora."""


_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_text(text: str, rules: TextRules) -> str:
    """Check a text and replace its placeholders as the rules say.

    Raises:
        RejectError: the text is too long, or has control characters or surrogate code points.
    """
    if len(text) > rules.max_characters:
        raise RejectError("text_too_long", f"{len(text)} characters, the limit is {rules.max_characters}")
    if not text.isascii() and (found := _SURROGATES.search(text)):
        raise RejectError("invalid_unicode", f"code point U+{ord(found[0]):04X} at character {found.start()}")
    if not rules.control_characters and not text.isprintable() and (found := _CONTROL_CHARACTERS.search(text)):
        raise RejectError("control_character", f"U+{ord(found[0]):04X} at character {found.start()}")
    if not rules.keep_placeholders and PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, PLACEHOLDER.upper())
    return text


# A control character that clean_text rejects; with control_characters=True it is still unlikely, and join_text removes
# it first.
_IMAGE_MARK = "\x00"


def join_text(document: Document, rules: JoinRules) -> Document:
    """Join the sentences between images into one text segment; a change of `train` also begins a new segment.

    Example: `("a", image, "b", "c")` becomes `("a", image, "b c")`.
    """
    runs: list[list[Text | Image]] = [[]]
    train: bool | None = None
    for segment in document.segments:
        if isinstance(segment, Text):
            if train is not None and segment.train != train:
                runs.append([])
            train = segment.train
        if isinstance(segment, (Text, Image)):
            runs[-1].append(segment)
    segments: list[Segment] = []
    for run in runs:
        joined = _join_run(run, rules)
        if segments and joined and _are_glued(segments[-1], joined[0]):
            joined[0] = joined[0]._replace(text=rules.separator + joined[0].text)  # type: ignore[union-attr, call-arg]
        segments += joined
    return dataclasses.replace(document, segments=tuple(segments))


def _are_glued(left: Segment, right: Segment) -> bool:
    """Tell whether two texts would be adjacent without a blank between them."""
    if not isinstance(left, Text) or not isinstance(right, Text):
        return False
    return not left.text[-1].isspace() and not right.text[0].isspace()


def _join_run(run: Sequence[Text | Image], rules: JoinRules) -> list[Segment]:
    """Join the sentences of a run of segments with the same `train`."""
    texts: list[str] = []
    train, marks = True, ""
    for segment in run:
        if isinstance(segment, Image):
            marks += _IMAGE_MARK
        else:
            texts.append(marks + segment.text.replace(_IMAGE_MARK, ""))
            train, marks = segment.train, ""
    joined = rules.separator.join(texts) + marks
    if not rules.keep_blanks and rules.separator:
        joined = joined.replace(_IMAGE_MARK + rules.separator, _IMAGE_MARK)
        joined = joined.replace(rules.separator + _IMAGE_MARK, _IMAGE_MARK)
    chunks = joined.split(_IMAGE_MARK)
    segments: list[Segment] = [Text(chunks[0], train)] if chunks[0] else []
    images = [segment for segment in run if isinstance(segment, Image)]
    for image, chunk in zip(images, chunks[1:], strict=True):
        segments.append(image)
        if chunk:
            segments.append(Text(chunk, train))
    return segments


def full(document: Document) -> tuple[Document, ...]:
    """Keep the document as it is."""
    return (document,)


def pairs(document: Document) -> tuple[Document, ...]:
    """Make one document of each image and the sentence that follows it; all other text is dropped.

    Each of several images before a sentence gets it; images before a blank sentence are dropped with it. Source: VILA,
    section 3.2, "MMC4-pairs".
    """
    found: list[Document] = []
    waiting: list[Image] = []
    for segment in document.segments:
        if isinstance(segment, Image):
            waiting.append(segment)
        elif isinstance(segment, Text):
            if segment.text.strip():
                found += [Document((image, segment), key=document.key) for image in waiting]
            waiting = []
    return tuple(found)


def images_first(document: Document) -> tuple[Document, ...]:
    """Move all images before all text, each in their order. Source: VILA, appendix, "reformatted" MMC4."""
    text = tuple(segment for segment in document.segments if isinstance(segment, Text))
    return (Document((*document.images, *text), key=document.key),)


def text_only(document: Document) -> tuple[Document, ...]:
    """Drop the images."""
    text = tuple(segment for segment in document.segments if isinstance(segment, Text))
    return (Document(text, key=document.key),) if text else ()


VARIANTS: dict[str, Callable[[Document], Sequence[Document]]] = {
    "full": full,
    "pairs": pairs,
    "images-first": images_first,
    "text-only": text_only,
}
