import time

import pytest

from megatron_vlm.platform.launch import time_limit
from megatron_vlm.platform.launch.time_limit import is_time_over


@pytest.mark.parametrize(("seconds", "minutes", "is_over"), [(90, None, False), (90, 2.0, False), (90, 1.5, True)])
def test_time_is_over_once_this_process_has_run_so_long(monkeypatch, seconds, minutes, is_over):
    monkeypatch.setattr(time_limit, "_started", time.monotonic() - seconds)
    assert is_time_over(minutes) == is_over
