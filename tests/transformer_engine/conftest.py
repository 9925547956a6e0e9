"""These tests run only through run.sh: the stand-in changes torch for the whole process."""

import sys

import pytest

IS_PREPARED = "tests.transformer_engine.plugin" in sys.modules
collect_ignore_glob = [] if IS_PREPARED else ["test_*.py"]


@pytest.fixture(autouse=True)
def hopper():
    """Let every test begin with a GPU of capability 9.0 and the optimizer that such a machine has."""
    from tests.transformer_engine import kernels, stand_in

    stand_in.set_capability(stand_in.HOPPER)
    kernels.use_adam("FusedAdam")


@pytest.fixture(scope="session")
def te_workers():
    """Four processes with the stand-in."""
    from tests.support.pool import WorkerPool

    pool = WorkerPool(4, setup="tests.transformer_engine.kernels:prepare")
    yield pool
    pool.close()
