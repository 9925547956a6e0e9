import pytest

from megatron_vlm.config.operations import Operations

PART = Operations(entry=1.0, inner=10.0, attention=100.0)


@pytest.mark.parametrize(
    ("learns", "input_gradient", "has_adapter", "expected"),
    [
        (False, False, False, 1 + 10 + 100),  # forward only
        (False, True, False, 2 + 20 + 300),  # the gradient passes through, no weights
        (True, False, False, 2 + 30 + 300),  # nothing before it wants the gradient of its input
        (True, True, False, 3 + 30 + 300),
        (False, False, True, 1 + 20 + 300),  # the gradient comes in, to the adapter's weights
        (False, True, True, 2 + 20 + 300),
    ],
)
def test_only_the_gradients_that_are_needed_are_counted(learns, input_gradient, has_adapter, expected):
    assert PART.training(learns=learns, input_gradient=input_gradient, has_adapter=has_adapter) == expected


def test_operations_of_many_inputs():
    assert PART.times(3).forward == 3 * PART.forward == 333
