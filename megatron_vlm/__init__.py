"""megatron_vlm: distributed pretraining of visual language models on megatron-core."""

__version__ = "0.1.0"
