import logging
from types import SimpleNamespace

import torch

from megatron_vlm.training.loop import train


def test_complete_run_says_so_and_takes_no_step(caplog):
    state = SimpleNamespace(iteration=6, train_iters=6, stop_reason=None)
    with caplog.at_level(logging.INFO):
        train(state, loaders=[], hooks=[], device=torch.device("cpu"), stop_requested=lambda: False)
    assert "the run is complete: 6 of 6 iterations are done" in caplog.text
    assert state.iteration == 6
