"""What the ranks of the conversion tests run."""

from dataclasses import replace

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, TrainConfig
from tests.support.jobs import start


def save_again(config: TrainConfig, weights: str) -> None:
    """Load the weights at this layout and save them."""
    state = start(replace(config, checkpoint=CheckpointConfig(load_weights=weights)))
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())
