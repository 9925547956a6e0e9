"""How each kind of tokenizer of `data/text/tokenizers/` becomes a tokenizer.json; the modules have the same names.

`found_in_text(tokenizer)` returns the added tokens that are found in a text although they are no control tokens, with
their flags; `tokenizer_json(tokenizer, tokens, image)` returns the file, or None if it cannot do the same;
`ggml_vocabulary(tokenizer, placeholders)` returns what stands below `tokenizer.ggml.` in a GGUF file, with the texts of
the placeholders by their id.
"""
