"""Interleaved corpora: MMC4, WebDataset, Energon, OBELICS."""
