"""Image-text pairs: COYO, img2dataset."""

from megatron_vlm.data.sources.pairs.source import find_source

__all__ = ["find_source"]
