"""Documents of readers in a form that a test can write out."""

from megatron_vlm.data.documents import Image, Special
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.source import Found


def show(found: Found, names: dict[bytes, str]) -> list | str:
    """Return text, names of images and names of control tokens in reading order; or the reason of a reject."""
    if isinstance(found.document, RejectError):
        return found.document.reason
    shown: list = []
    for segment in found.document.segments:
        if isinstance(segment, Image):
            shown.append(names[segment.data])
        else:
            shown.append(segment.token if isinstance(segment, Special) else segment.text)
    return shown
