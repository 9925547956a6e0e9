import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.config.inference import SamplingOptions


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_options_out_of_range_are_refused(settings):
    with pytest.raises(UsageError, match=f"--{next(iter(settings)).replace('_', '-')} .* is out of range; fix: choose"):
        SamplingOptions(**settings)
