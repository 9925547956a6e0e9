"""Text to token ids: tokenizer, chat templates, encoding of documents."""
