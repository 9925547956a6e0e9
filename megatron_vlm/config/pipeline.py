"""Which decoder layers each model chunk of a pipeline holds, also where a layout names them one by one.

A layout lists the model chunks in the order in which a micro-batch passes them: the first of every stage, then the
second of every stage, and so on. It is written as megatron-core writes it, as a string such as `Et*3|t*4|t*3L` or as
lists of the names in `LAYER_TYPES`.

Source: megatron-core 0.16.1, `transformer/pipeline_parallel_layer_layout.py`.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise

from megatron_vlm.config.errors import ConfigError

Spelling = str | tuple[tuple[str, ...], ...]

EMBEDDING, DECODER, LOSS = "embedding", "decoder", "loss"
LAYER_TYPES = {"E": EMBEDDING, "t": DECODER, "L": LOSS}
"""Names of what a chunk may hold, by their letters. The embedding stands for the vision parts, too, and the loss for
final norm and output layer."""
_UNUSED_TYPES = {"m": "mtp", "encoder": "encoder"}
"""Further types of megatron-core, which no model here has."""
_KEY = "parallel.pipeline_model_parallel_layout"
_HOW = "write E, then a t for each decoder layer, then L, with | between chunks, such as Et*3|t*4|t*3L"
_REPEATS = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))
"""Repeated groups, which do not contain each other, and then repeated letters."""
_MAX_LENGTH = 100_000
"""Characters of a layout when all repeats are written out; models have at most 10,000 layers."""


@lru_cache(maxsize=64)
def parse_layout(layout: Spelling) -> tuple[tuple[str, ...], ...]:
    """Return the names of what each model chunk holds.

    Raises:
        ConfigError: a letter or name is unknown, or the layout is too long.
    """
    if not isinstance(layout, str):
        return tuple(tuple(_layer_type(name, name.strip().lower()) for name in chunk) for chunk in layout)
    text = layout.replace(",", "")
    for pattern in _REPEATS:
        text = "".join(_repeat(text, pattern))
    return tuple(tuple(_layer_type(letter, LAYER_TYPES.get(letter)) for letter in chunk) for chunk in text.split("|"))


def _layer_type(spelling: str, name: str | None) -> str:
    if name is not None and name in LAYER_TYPES.values():
        return name
    if spelling in _UNUSED_TYPES or name in _UNUSED_TYPES.values():
        what, fix = f"{_KEY} has {spelling!r}: no model here has such layers", "remove it"
    else:
        known = ", ".join(f"{letter} ({name})" for letter, name in LAYER_TYPES.items())
        what = f"{_KEY} has {spelling[:20]!r}, which is not one of {known}"
        fix = "use letters, | and * in a string, and names in lists"
    raise ConfigError(what, fix=fix)


def _repeat(text: str, pattern: re.Pattern[str]) -> Iterator[str]:
    """Yield the pieces of the text with its repeats written out."""
    length = end = 0
    for match in pattern.finditer(text):
        yield text[end : match.start()]
        end = match.end()
        # Python does not read numbers of more than 4,300 digits.
        is_huge = len(match[2].lstrip("0")) > len(str(_MAX_LENGTH))
        count = 0 if is_huge else int(match[2])
        length += len(match[1]) * count
        if is_huge or length > _MAX_LENGTH:
            raise ConfigError(f"{_KEY} has more than {_MAX_LENGTH} letters", fix="repeat fewer")
        yield match[1] * count
    yield text[end:]


def check_layout(layout: Spelling, num_stages: int, num_chunks: int | None) -> None:
    """Check a layout against the size of the pipeline.

    Args:
        layout: as in the settings.
        num_stages: pipeline stages.
        num_chunks: model chunks per stage that the settings name; None if the layout decides.

    Raises:
        ConfigError: it does not fit the stages, or embedding or loss are not where they must be.
    """
    chunks = parse_layout(layout)
    if num_stages == 1:
        raise ConfigError(f"{_KEY} needs pipeline_model_parallel_size > 1", fix="remove it, or raise the size")
    if len(chunks) % num_stages:
        raise ConfigError(
            f"{_KEY} has {len(chunks)} chunks, which is not a multiple of pipeline_model_parallel_size={num_stages}",
            fix=_HOW,
        )
    if num_chunks is not None and len(chunks) != num_chunks * num_stages:
        raise ConfigError(
            f"{_KEY} means virtual_pipeline_model_parallel_size={len(chunks) // num_stages}, which is {num_chunks}",
            fix="remove parallel.virtual_pipeline_model_parallel_size",
        )
    names = [name for chunk in chunks for name in chunk]
    for name, chunk, place in ((EMBEDDING, chunks[0][:1], "begin the first"), (LOSS, chunks[-1][-1:], "end the last")):
        if chunk != (name,) or names.count(name) != 1:
            raise ConfigError(f"{_KEY}: {name} must {place} chunk, and stand nowhere else", fix=_HOW)
    empty = [stage for stage in range(num_stages) if not any(chunks[stage::num_stages])]
    if empty:
        raise ConfigError(f"{_KEY} leaves stage {empty[0]} without a layer", fix="give it one, or use fewer stages")


def count_chunks(layout: Spelling, num_stages: int) -> int | None:
    """Return the model chunks of each stage; None if it is one, which is no virtual pipeline."""
    chunks = len(parse_layout(layout)) // num_stages
    return None if chunks == 1 else chunks


def count_layers(layout: Spelling) -> tuple[int, ...]:
    """Return the decoder layers of each model chunk."""
    return tuple(chunk.count(DECODER) for chunk in parse_layout(layout))


def place_layers(counts: tuple[int, ...], num_stages: int) -> tuple[tuple[range, ...], ...]:
    """Return the decoder layers, counted from 0, of each stage's chunks in order.

    Args:
        counts: layers of each model chunk, in the order in which a micro-batch passes them.
        num_stages: pipeline stages.
    """
    chunks = [range(first, end) for first, end in pairwise((0, *accumulate(counts)))]
    return tuple(tuple(chunks[stage::num_stages]) for stage in range(num_stages))
