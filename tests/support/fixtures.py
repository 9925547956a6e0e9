"""Jobs of one rank in this process, and of several in others."""

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.parallel.groups import build_groups, seed_everything, stop_distributed
from tests.support.fake_device import FakeDeviceProcess
from tests.support.played_ranks import CANNOT_PLAY, can_play
from tests.support.pool import WorkerPool
from tests.support.release import release_models


@pytest.fixture(scope="session")
def workers():
    """Four processes for distributed tests."""
    pool = WorkerPool(4)
    yield pool
    pool.close()


@pytest.fixture
def one_rank(tmp_path):
    """A job of one rank in this process, seeded."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    build_groups(ParallelConfig())
    seed_everything(7)
    yield
    stop_distributed()
    release_models()


@pytest.fixture(scope="session")
def fake_process():
    """A process on the fake device."""
    if not can_play():
        pytest.skip(CANNOT_PLAY)
    process = FakeDeviceProcess()
    yield process
    process.close()
