"""Compare the tokenizers of two models: pieces, special tokens, chat templates, and what they make of texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from megatron_vlm.convert.opened_weights import OpenedWeights
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.text.tokenizer_files import JSON_FILE, read_chat_template

_SHOWN_IDS, _SHOWN_TEXT = 8, 40
PROBES = (
    "USER: What is in the picture? ASSISTANT: A bird on a branch.",
    "a",
    " begins with a blank",
    "two  blanks,   three, and one at the end ",
    "Line one\nline two\n\nline four\r\n\tindented",
    "In 2024, 1234567890 of 0.5 % cost $1,999.99 (-3e-7)",
    "for x in range(10): print(f'{x:>4}')  # https://example.org/a?b=c&d=%20",
    "don't, it's, WE'LL, naïve café, Straße, İstanbul, ﬁ, e\u0301",
    "汉字 かな 한국어 русский ελληνικά עברית العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧 ∑∫√ ½ ™ \u00a0 \u200b",
    "<b>bold</b> | a | b |\n---\n```code```",
)
"""Blanks, line breaks, digits, code, marks, many scripts and what no vocabulary has; none spells a control token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerComparison:
    """What two tokenizers have in common."""

    summary: str
    """For people."""
    faults: tuple[str, ...]
    """What differs, a line each."""


def compare_tokenizers(first: OpenedWeights, second: OpenedWeights) -> TokenizerComparison:
    """Compare the tokenizers of two models; two folders also have chat templates to compare.

    A folder with a SentencePiece model and a tokenizer.json, which other programs read, is compared with itself, too.

    Raises:
        ConfigError: a tokenizer is damaged or of an unknown kind.
    """
    without = [str(one.path) for one in (first, second) if one.tokenizer is None]
    if without:
        return TokenizerComparison(summary=f"not compared, {' and '.join(without)} without one", faults=())
    ours, theirs = (load_tokenizer(one.tokenizer) for one in (first, second) if one.tokenizer is not None)
    faults = [
        *_different_pieces(ours, theirs),
        *_different_special_tokens(ours, theirs),
        *_different_texts(ours, theirs),
        *_different_files(ours),
        *_different_files(theirs),
    ]
    if first.settings is None and second.settings is None:
        faults += _different_templates(ours.files.path.parent, theirs.files.path.parent)
    summary = "differ" if faults else f"{ours.vocab_size:,} pieces and the ids of {len(PROBES)} texts are the same"
    return TokenizerComparison(summary=summary, faults=tuple(faults))


def _different_pieces(first: Tokenizer, second: Tokenizer) -> Iterator[str]:
    if first.vocab_size != second.vocab_size:
        yield f"vocabularies have {first.vocab_size:,} and {second.vocab_size:,} pieces"
    common = range(min(first.vocab_size, second.vocab_size))
    different = [token for token in common if first.piece(token) != second.piece(token)]
    if different:
        token = different[0]
        yield f"{len(different):,} pieces differ, first {token}: {first.piece(token)!r} and {second.piece(token)!r}"


def _different_special_tokens(first: Tokenizer, second: Tokenizer) -> Iterator[str]:
    if first.bos != second.bos or first.bos_id != second.bos_id:
        yield f"BOS is {_named(first, first.bos_id)} and {_named(second, second.bos_id)}"
    if first.eos_id != second.eos_id:
        yield f"EOS is {_named(first, first.eos_id)} and {_named(second, second.eos_id)}"
    common = range(min(first.vocab_size, second.vocab_size))
    different = [token for token in common if first.is_control(token) != second.is_control(token)]
    if different:
        which = "first" if first.is_control(different[0]) else "second"
        yield f"{_named(first, different[0])} is a control token in the {which} only; {len(different):,} like it"


def _named(tokenizer: Tokenizer, token: int | None) -> str:
    return "none" if token is None else f"{token} {tokenizer.piece(token)!r}"


def _different_texts(first: Tokenizer, second: Tokenizer) -> Iterator[str]:
    pairs = ((text, continues) for text in PROBES for continues in (False, True))
    for text, continues in pairs:
        ids = [tokenizer.encode(text, continuation=continues) for tokenizer in (first, second)]
        if ids[0] != ids[1]:
            yield f"the text {text[:_SHOWN_TEXT]!r} has the ids {_first_ids(*ids)}"
            return


def _different_files(tokenizer: Tokenizer) -> Iterator[str]:
    """Compare a tokenizer with the tokenizer.json beside its file."""
    path = tokenizer.files.path.with_name(JSON_FILE)
    if path == tokenizer.files.path or not path.is_file():
        return
    try:
        other = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package has no type of its own
        if type(error) is not Exception:
            raise
        yield f"{path} cannot be read: {error}"
        return
    for text in PROBES:
        ids, found = tokenizer.encode(text), other.encode(text, add_special_tokens=False).ids
        found = found[1:] if found[:1] == [tokenizer.bos_id] else found
        if ids != found:
            name = tokenizer.files.path.name
            yield f"{path} differs from {name}: the text {text[:_SHOWN_TEXT]!r} has the ids {_first_ids(found, ids)}"
            return


def _first_ids(first: list[int], second: list[int]) -> str:
    """Show two lists from the first id that differs."""
    start = _first_difference(first, second)
    shown = (one[start : start + _SHOWN_IDS] for one in (first, second))
    return f"{' and '.join(map(str, shown))} from position {start} on"


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the first place at which two sequences differ; the end of the shorter one if it begins the other."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _different_templates(first: Path, second: Path) -> Iterator[str]:
    templates = [read_chat_template(folder) for folder in (first, second)]
    if templates[0] == templates[1]:
        return
    if None in templates:
        yield f"only the {'second' if templates[0] is None else 'first'} has a chat template"
        return
    ours, theirs = (str(template) for template in templates)
    start = _first_difference(ours, theirs)
    shown = (repr(one[start : start + _SHOWN_TEXT]) for one in (ours, theirs))
    yield f"chat templates differ from character {start} on: {' and '.join(shown)}"
