import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_vlm.platform.device import prepare_process  # noqa: E402

prepare_process()

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests.support.fake_ranks import play  # noqa: E402
from tests.support.fault_kinds import NAMES  # noqa: E402
from tests.support.fixtures import fake_process, one_rank, workers  # noqa: E402

__all__ = ["fake_process", "one_rank", "play", "workers"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the kinds of faults, which `tests/run.sh -m faults` runs, too."""
    for item in items:
        if item.nodeid.partition("[")[0] in NAMES:
            item.add_marker("fault_kind")


# How long an example takes says more about the machine's other work than about the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
