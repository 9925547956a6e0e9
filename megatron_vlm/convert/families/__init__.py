"""One file a Hugging Face model family: names of tensors and settings."""
