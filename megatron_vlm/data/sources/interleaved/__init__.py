"""Interleaved corpora: MMC4, WebDataset, Energon, OBELICS."""

from megatron_vlm.data.sources.interleaved.source import find_source

__all__ = ["find_source"]
