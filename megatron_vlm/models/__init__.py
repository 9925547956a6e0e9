"""The vision language model, from megatron-core parts."""
