import pytest

from tests.platform.fake_device import programs

SHAPE = (1, 16, 512, 64)


# An output of 2 bytes for each element of the input; of float32 numbers, one for each row of 64.
@pytest.mark.parametrize("name", ["rms_norm", "attention", "causal"])
def test_gpu_keeps_the_output_and_one_number_a_row(fake_process, name):
    kept, shape, device = fake_process.run(programs.keep_for_backward, name)
    assert kept == pytest.approx(2 + 4 / 64, abs=0.003)  # beside them, 512 bytes each for seed and offset
    assert (shape, device) == (SHAPE, "cuda:0")
