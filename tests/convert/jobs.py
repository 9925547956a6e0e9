"""What the ranks of the conversion tests run."""

from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, TrainConfig
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.training.state import TrainState
from tests.support.jobs import start


def save_again(config: TrainConfig, weights: str) -> None:
    """Load the weights at this layout and save them."""
    _save_again(config, weights)


def save_logits(config: TrainConfig, weights: str, ids: Tensor, output: str) -> None:
    """Load the weights at this layout, save them, and save their logits for a text, float[s, v].

    Args:
        config: of the layout, and where the weights go.
        weights: the run.
        ids: int64[1, s], without images.
        output: file of the logits.
    """
    state = _save_again(config, weights)
    width = config.model.language.padded_vocab_size // state.rank.tp_size

    def forward(batches: object, chunk: VisionLanguageModel) -> tuple[Tensor, Callable[..., Tensor]]:
        side, none = config.model.vision.image_size, torch.zeros(0, dtype=torch.int64)
        logits = chunk(ids, torch.zeros(0, 3, side, side, dtype=torch.uint8), none, num_images=0)
        return logits, gather

    def gather(logits: Tensor, non_loss_data: bool) -> Tensor:
        # The last ranks have no logits of rows behind the vocabulary.
        return gather_from_tensor_model_parallel_region(torch.nn.functional.pad(logits, (0, width - logits.size(-1))))

    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=state.chunks,
        num_microbatches=1,
        seq_length=ids.size(1),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if state.rank.is_last_stage and state.rank.tp_rank == 0:
        torch.save(found[0][0], output)


def _save_again(config: TrainConfig, weights: str) -> TrainState:
    state = start(replace(config, checkpoint=CheckpointConfig(load_weights=weights)))
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    return state
