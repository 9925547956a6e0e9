"""Token ids of a text that shows which inputs of the decoder's matrices are large."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.config import DataError
from megatron_vlm.data.text.tokenizer import Tokenizer

SEQUENCE_LENGTH, MAX_SEQUENCES, MIN_SEQUENCES = 512, 128, 4
"""As in llm-awq, which takes 128 sequences of 512 tokens; a shorter text is used whole."""
_CHARACTERS_PER_TOKEN = 16
"""More than any text has: the rest of a large file is not read."""


def read_calibration(path: Path, tokenizer: Tokenizer) -> Tensor:
    """Cut the beginning of a text into sequences, each with BOS before it if the tokenizer has one.

    Returns:
        int64[n, 512], n at most 128.

    Raises:
        DataError: the file cannot be read, is no text in UTF-8, or is shorter than 4 sequences.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = SEQUENCE_LENGTH - len(begin)
    ids = tokenizer.encode(_read_text(path, MAX_SEQUENCES * length * _CHARACTERS_PER_TOKEN))
    count = min(len(ids) // length, MAX_SEQUENCES)
    if count < MIN_SEQUENCES:
        raise DataError(
            f"calibration text has {len(ids)} tokens, at least {MIN_SEQUENCES * length} are needed",
            where=str(path),
            fix=f"name a longer one; up to {MAX_SEQUENCES * length} tokens are used",
        )
    return torch.tensor([begin + ids[row * length : (row + 1) * length] for row in range(count)])


def _read_text(path: Path, num_characters: int) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(num_characters)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise DataError(
            f"calibration text cannot be read: {reason}", where=str(path), fix="name a text file with --calibration"
        ) from None
