import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.supervision import SupervisionConfig


@pytest.mark.parametrize("name", ["setup_minutes", "first_step_minutes", "step_minutes", "save_minutes"])
@pytest.mark.parametrize("value", [0, -1, 1e9])
def test_limit_that_is_no_time_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"supervision.{name}="):
        SupervisionConfig(**{name: value})
