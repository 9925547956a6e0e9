"""From a document to the token ids and images of one sample."""

from collections.abc import Iterable

import numpy as np

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import Control, Document, Image, Segment, Special, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.text.tokenizer import Tokenizer


def encode_segments(segments: Iterable[Segment], tokenizer: Tokenizer) -> tuple[TextSegment | ImageSegment, ...]:
    """Tokenise segments one by one; neighbours with the same mask become one text segment.

    Each segment is tokenised on its own, so the mask does not depend on how a longer text would be split into pieces.
    The first text of a sample, and the first one after an image, begins with the word-begin mark; a text that follows
    text or a control token continues it. With a tokenizer that has no BOS, a sample begins with its first segment.

    Raises:
        ConfigError: a token that a template names is not in the vocabulary.
    """
    encoded: list[TextSegment | ImageSegment] = []
    ids: list[int] = []
    train = continuation = False
    for segment in segments:
        if isinstance(segment, Image):
            _flush(encoded, ids, train)
            ids = []
            encoded.append(ImageSegment(segment.data, segment.size))
            continuation = False
            continue
        if segment.train != train:
            _flush(encoded, ids, train)
            ids, train = [], segment.train
        if isinstance(segment, Text):
            new = tokenizer.encode(segment.text, continuation=continuation)
            ids += new
            continuation = continuation or bool(new)
        elif (special := _special_id(segment, tokenizer)) is not None:
            ids.append(special)
            # BOS opens a text only at the very start of the sample.
            continuation = bool(encoded) or len(ids) > 1 or segment.token is not Control.BOS
    _flush(encoded, ids, train)
    return tuple(encoded)


def encode_document(document: Document, tokenizer: Tokenizer, *, bos: bool = True, eos: bool = True) -> EncodedSample:
    """Encode a document as one sample: BOS if the tokenizer has one, its segments, EOS.

    Nothing else needs BOS: where a sample starts in a packed row is known from the plan, and its first token has no
    loss.

    Args:
        document: what to encode.
        tokenizer: of the dataset.
        bos: whether the recipe wants BOS.
        eos: whether the recipe wants EOS.

    Raises:
        RejectError: no token of the sample is trained, apart from BOS and EOS.
    """
    segments = document.segments
    if not any(isinstance(segment, Text) and segment.train and segment.text for segment in segments):
        raise RejectError("nothing_to_train", "the document has no text that is trained")
    first = next(segment for segment in segments if not isinstance(segment, Image))
    opening = (Special(Control.BOS, first.train),) if bos else ()
    closing = (Special(Control.EOS),) if eos else ()
    return EncodedSample(encode_segments((*opening, *segments, *closing), tokenizer))


def _flush(encoded: list[TextSegment | ImageSegment], ids: list[int], train: bool) -> None:
    if ids:
        encoded.append(TextSegment(np.array(ids, dtype=np.int32), train))


def _special_id(segment: Special, tokenizer: Tokenizer) -> int | None:
    if segment.token is Control.BOS:
        return tokenizer.bos_id
    if segment.token is Control.EOS:
        return tokenizer.eos_id
    found = tokenizer.piece_id(segment.token)
    if found is None:
        raise ConfigError(
            f"the template needs the token {segment.token}, which the tokenizer does not have",
            where=str(tokenizer.files.path),
            fix="choose another template or tokenizer; for tokens that a Hugging Face folder adds, name the folder",
        )
    return found
