"""The vision-language model, built on megatron-core."""
