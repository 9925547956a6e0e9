"""A CUDA device that is not there: its tensors have shapes and lifetimes, but no values and no memory.

`guard.load_guard` comes before the first import of torch, `device.install` before the first import of megatron-core.
"""
