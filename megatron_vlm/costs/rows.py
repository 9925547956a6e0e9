"""Rows that stand for those of a run whose shards do not exist yet."""

from megatron_vlm.config import DataConfig, TrainConfig
from megatron_vlm.costs.flops import Work

TEXT_OF_PAIR = 24
"""Tokens of a pair beside its image: the first token and the caption. Source: 22.7 tokens in COYO, arXiv:2312.07533,
table 2."""


def pairs(config: TrainConfig) -> Work:
    """Return a micro-batch whose rows hold as many image-text pairs as fit or are allowed, and text up to their end.

    Raises:
        ConfigError: the number of tokens depends on the image size.
    """
    pair = config.model.fixed_image_tokens("a row of image-text pairs") + TEXT_OF_PAIR
    number = most_pairs(config.data, pair)
    rest = config.data.seq_length - number * pair
    rows = config.training.micro_batch_size
    return Work(
        num_tokens=rows * config.data.seq_length,
        attention_pairs=rows * (number * causal_pairs(pair) + causal_pairs(rest)),
        num_labels=rows * (number * (TEXT_OF_PAIR - 1) + max(0, rest - 1)),
        num_images=rows * number,
    )


def most_pairs(data: DataConfig, pair: int) -> int:
    """Return how many image-text pairs of `pair` tokens a row holds."""
    fitting = data.seq_length // pair
    return fitting if data.max_images_per_row is None else min(fitting, data.max_images_per_row)


def text(config: TrainConfig) -> Work:
    """Return a micro-batch whose rows are one long text, with a loss at every position."""
    length, rows = config.data.seq_length, config.training.micro_batch_size
    return Work(
        num_tokens=rows * length,
        attention_pairs=rows * causal_pairs(length),
        num_labels=rows * length,
        num_images=0,
    )


def causal_pairs(length: int) -> int:
    """Return the query-key pairs of causal attention inside a sample of `length` tokens."""
    return length * (length + 1) // 2
