"""One kind of tokenizer a module: `recognises(files)` tells whether files are of it, `Tokenizer(files)` reads them.

`Tokenizer` is the subclass of `data.text.tokenizer.Tokenizer`.
"""
