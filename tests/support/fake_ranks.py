"""One process plays any rank of a large job: torch's "fake" process group answers every collective at once."""

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.parallel.groups import build_groups, rank_layout, stop_distributed
from megatron_vlm.training import step as training_step
from megatron_vlm.training.setup import build_random_state
from tests.support.jobs import CPU, DATASETS, FixedPlan, batches_of
from tests.support.samples import make_samples


@pytest.fixture
def play(monkeypatch):
    """Build, and step, one rank of a world that is not there: `play(config, rank, world_size)` returns its state."""
    empty = torch.empty

    def zeros(*args, **settings):
        # What a fake peer "sends" is whatever the buffer held; zeros keep the numbers finite.
        with torch.no_grad():
            return empty(*args, **settings).zero_()

    monkeypatch.setattr(torch, "empty", zeros)
    # The other ranks consume nothing.
    monkeypatch.setattr(training_step, "check_samples", lambda *arguments, **settings: None)

    def run(config, rank, world_size, *, step=True):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            build_groups(config.parallel)
            state = build_random_state(config, rank_layout(), FixedPlan.of(config, num_iterations=2), DATASETS)
            if not step:
                return state
            rows = [[index % 8] for index in range(config.training.global_batch_size)]
            samples = make_samples(8, max_images=1)
            loaders = [batches_of(config, state.rank, rows, samples, 0) for _ in state.chunks]
            training_step.train_step(state, loaders, device=CPU, stop_requested=False)
            return state
        finally:
            stop_distributed()

    return run
