"""What ranks do to show that rows of the vocabulary without a token do not learn."""

import torch

from megatron_vlm.config import TrainConfig
from tests.support.jobs import FixedPlan, batches_of, start, step
from tests.support.samples import make_samples

NUM_STEPS = 3


def rows_that_change(config: TrainConfig) -> dict[str, list[int]]:
    """Do steps on rows with images and padding; return the ids whose rows have other bits afterwards, by weight."""
    rows = [[index % 8] for index in range(NUM_STEPS * config.training.global_batch_size)]
    state = start(config, FixedPlan.of(config, rows))
    loaders = [batches_of(config, state.rank, rows, make_samples(8), 0) for _ in state.chunks]
    before = {name: weight.detach().clone() for name, weight in _vocabulary(state)}
    for _ in range(NUM_STEPS):
        step(state, loaders)
    state.gather_parameters()
    first = state.rank.tp_rank * config.model.language.padded_vocab_size // state.rank.tp_size
    return {
        name: (first + (weight != before[name]).any(dim=1).nonzero().flatten()).tolist()
        for name, weight in _vocabulary(state)
    }


def _vocabulary(state) -> list[tuple[str, torch.Tensor]]:
    named = [pair for chunk in state.chunks for pair in chunk.named_parameters()]
    return [
        (name, weight) for name, weight in named if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    ]
