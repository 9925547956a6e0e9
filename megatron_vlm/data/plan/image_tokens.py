"""How many tokens an image takes in a row of the language model."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import ModelConfig, config_to_dict
from megatron_vlm.data.samples import ImageSegment, TextSegment

_CHUNK = 1 << 20  # images looked up at a time, about 50 MB


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The tokens of an image: the same number for all images, or a function of width and height."""

    constant: int | None = None
    """Tokens of every image; None if the number depends on the size."""
    function: Callable[[int, int], int] | None = None
    """Tokens of an image by width and height [pixels]; None if the number is constant."""
    identity: str = ""
    """Text that differs whenever `function` may differ; plans depend on it."""

    @classmethod
    def from_model(cls, model: ModelConfig) -> "ImageTokens":
        """Take the function from the model's tower and projection."""
        constant = model.constant_image_tokens
        if constant is not None:
            return cls(constant)
        tree = config_to_dict(model)
        identity = json.dumps([tree["vision"], tree["projection"]], sort_keys=True)
        return cls(function=model.num_image_tokens, identity=identity)

    def describe(self) -> int | str:
        """Return what a plan depends on."""
        return self.identity if self.constant is None else self.constant

    def of_image(self, size: tuple[int, int] | None) -> int:
        """Return the tokens of one image.

        Args:
            size: width and height [pixels]; may be None if the number is constant.

        Raises:
            ValueError: the size is needed but unknown, or the image would take no tokens.
        """
        if self.constant is not None:
            return self.constant
        if size is None or self.function is None:
            raise ValueError("the number of tokens depends on the size of the image, which is unknown")
        tokens = self.function(*size)
        if tokens < 1:
            raise ValueError(f"an image of {size[0]}x{size[1]} pixels would take {tokens} tokens")
        return tokens

    def of_segment(self, segment: TextSegment | ImageSegment) -> int:
        """Return the tokens of one text or image."""
        return self.of_image(segment.size) if isinstance(segment, ImageSegment) else len(segment.input_ids)

    def of_images(self, sizes: np.ndarray) -> np.ndarray:
        """Return the tokens of many images, int32[images]; the function is called once for each distinct size.

        Args:
            sizes: uint16[images, 2]; width and height [pixels].

        Raises:
            ValueError: an image would take no tokens.
        """
        if self.constant is not None:
            return np.full(len(sizes), self.constant, dtype=np.int32)
        known: dict[int, int] = {}
        tokens = np.empty(len(sizes), dtype=np.int32)
        for first in range(0, len(sizes), _CHUNK):
            chunk = sizes[first : first + _CHUNK].astype(np.uint32)
            distinct, kind = np.unique(chunk[:, 0] << 16 | chunk[:, 1], return_inverse=True)
            codes = distinct.tolist()
            known |= {code: self.of_image((code >> 16, code & 0xFFFF)) for code in codes if code not in known}
            tokens[first : first + _CHUNK] = np.array([known[code] for code in codes], dtype=np.int32)[kind]
        return tokens
