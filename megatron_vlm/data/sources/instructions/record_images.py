"""The images that a record of instruction data names or contains."""

from typing import Any, NamedTuple

from megatron_vlm.data.documents import Image
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import DATA_URI, ImageReader, decode_base64

PATH_FIELDS = ("image", "images")
BASE64_FIELDS = ("image_base64_str", "image_base64", "image_str")
_URL_STARTS = ("http://", "https://")


class ImageRef(NamedTuple):
    """Where one image is: in the image folder or tars by name or URL, or in the record itself."""

    name: str | None = None
    url: str | None = None
    data: bytes | None = None

    def load(self, images: ImageReader) -> Image:
        """Return the checked image; RejectError if it is missing or not accepted."""
        return images.find(self.name, self.url) if self.data is None else images.check(self.data)


def find_images(record: dict[str, Any]) -> list[ImageRef]:
    """Return the images of a record, in order, from the first of the known fields that has any.

    `image` and `images` hold paths, URLs, `data:` URIs or the `{bytes, path}` of parquet files, one or a list;
    `image_base64_str`, `image_base64` and `image_str` the file itself as base64, one or a list.

    Raises:
        RejectError: a field has another type, or is not base64.
    """
    for name in (*PATH_FIELDS, *BASE64_FIELDS):
        if refs := read_refs(record.get(name), name, is_base64=name in BASE64_FIELDS):
            return refs
    return []


def read_refs(value: Any, name: str, *, is_base64: bool = False) -> list[ImageRef]:
    """Return the images of one field: none, one, or a list; RejectError for another type, or if it is not base64.

    Null, an empty text and `{bytes, path}` without either are no image.
    """
    values = [one for one in (value if isinstance(value, list) else [value]) if not _is_none(one)]
    if is_base64:
        return [ImageRef(data=decode_base64(one, name)) for one in values]
    return [read_ref(one, name) for one in values]


def _is_none(value: Any) -> bool:
    """Tell whether a value is one of the ways in which tables write that there is no image."""
    if isinstance(value, dict):
        return ("bytes" in value or "path" in value) and not (value.get("bytes") or value.get("path"))
    return value is None or value == ""


def read_ref(value: Any, name: str) -> ImageRef:
    """Return an image given as path, URL, `data:` URI or `{bytes, path}`; RejectError for anything else."""
    if isinstance(value, dict):
        data, value = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return ImageRef(data=data)
        if isinstance(data, str):
            return ImageRef(data=decode_base64(data, name))
    if not isinstance(value, str):
        raise RejectError("json_type", f"{name} is neither a path nor a list of paths")
    if value.startswith(DATA_URI):
        return ImageRef(data=decode_base64(value, name))
    # A file in a folder may be named like a URL, and a member of a tar is found by name or URL.
    return ImageRef(name=value, url=value if value.startswith(_URL_STARTS) else None)
