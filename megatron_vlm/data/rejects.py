"""Why a document was rejected: the error, and its line in the list of rejects."""

import json
from collections.abc import Mapping

from megatron_vlm.config import DataError

_MAX_DETAIL = 300


class RejectError(DataError):
    """A document that cannot become a sample; `reason` is the word under which it is counted: "image_truncated"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple:
        return (RejectError, (self.reason, self.detail))


def reject_row(file: str, line: int | None, key: str | None, error: RejectError) -> str:
    """Return one line of the list of rejects.

    Args:
        file: name of the input file.
        line: line or row in the file, from 1; None if it has no lines.
        key: see `Document.key`.
        error: why it was rejected.
    """
    row = {"file": file, "line": line, "key": key, "reason": error.reason}
    return json.dumps(row | {"detail": error.detail[:_MAX_DETAIL]}) + "\n"


def describe_rejects(rejects: Mapping[str, int]) -> str:
    """Return the reasons and their counts as text, most frequent first."""
    counted = sorted(rejects.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {count}" for reason, count in counted if count)
