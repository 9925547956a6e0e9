"""Rules by which a tokenizer.json writes the start of a sample, the same one for every door that leads to it.

A prompt arrives in two forms, and each is tokenized both with and without "special tokens":

- rendered from the chat template: by `processor(text=...)` with them, by `tokenizer.apply_chat_template` and by the
  chat endpoints of servers without them. The template therefore has to write BOS, and the tokenizer must not add one;
- as bare text: by `processor(text=...)` and `tokenizer(...)` with them. Here the tokenizer has to add BOS.

A post-processor, the usual place of BOS, cannot tell the forms apart and gives two BOS to one of them. So the
normalizer writes BOS in front of a text that does not begin with it. It sees the whole text, with its added tokens,
because all of them are marked as `normalized`.

Consequence: `add_special_tokens` has no effect. Text that continues a prompt must be tokenized together with it.
"""

import re
from collections.abc import Sequence
from typing import Any

WORD_BEGIN = "\u2581"


def normalizer(*, bos: str, image: str, added: Sequence[str], word_begin: bool) -> list[dict[str, Any]]:
    """Return the first rules of a normalizer.

    Args:
        bos: text of the token that starts a sample; empty if there is none.
        image: text of the placeholder.
        added: texts of all added tokens, `bos` and `image` among them.
        word_begin: whether the first text of a sample, and the first one after an image, starts with the word-begin
            mark, as `encode_segments` has it.
    """
    any_added = "|".join(_escape(text) for text in sorted(added, key=len, reverse=True))
    first, after_image = rf"\A{_escape(bos)}", _escape(image)
    # The library normalizes the text of each added token, too, to find it in a normalized text: these stay as they are.
    rules = [_replace(rf"(?!{first})\A(?!(?:{any_added})\z)", bos)] if bos else []
    if word_begin:
        rules.append(_replace(rf"(?:(?<={first})|(?<={after_image}))(?!{any_added}|\z)", WORD_BEGIN))
    return rules


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _escape(text: str) -> str:
    """Return a regular expression for the text in the library's syntax, which is Oniguruma's."""
    return re.sub(r"([^\w\s])", r"\\\1", text)
