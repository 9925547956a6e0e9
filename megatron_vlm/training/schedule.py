"""The learning rate of an iteration, as a pure function: a resume needs no saved state."""

import math

from megatron_vlm.config import ConfigError, OptimizerConfig


def num_warmup_iters(optimizer: OptimizerConfig, train_iters: int) -> int:
    """Return the number of warm-up iterations.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    warmup = optimizer.lr_warmup_iters
    if warmup is None:
        warmup = math.ceil(optimizer.lr_warmup_fraction * train_iters)
    if warmup > train_iters:
        raise ConfigError(
            f"the warm-up of {warmup} iterations is longer than the run of {train_iters}",
            fix="lower optimizer.lr_warmup_iters",
        )
    return warmup


def learning_rate(optimizer: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Return the learning rate of a step.

    Args:
        optimizer: peak, end and shape of the curve.
        iteration: steps done before this one, from 0.
        train_iters: steps of the whole run.

    Returns:
        A linear rise from lr / warm-up to lr, then the decay from lr to min_lr at the last step.
    """
    warmup = num_warmup_iters(optimizer, train_iters)
    if iteration < warmup:
        return optimizer.lr * (iteration + 1) / warmup
    if optimizer.lr_decay_style == "constant":
        return optimizer.lr
    done = min(1.0, (iteration - warmup) / max(1, train_iters - warmup))
    part = 1.0 - done if optimizer.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * part
