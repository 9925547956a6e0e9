"""Model families of Hugging Face: each module is one, found by the `model_type` of a folder's config.json.

`convert/family.py` lists the functions of a module.
"""
