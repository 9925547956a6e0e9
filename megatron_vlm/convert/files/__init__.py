"""Tokenizer and processor files of an exported model."""
