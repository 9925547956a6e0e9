import pytest

from megatron_vlm.config import BlendEntry, ConfigError
from megatron_vlm.config.blend import check_blend, datasets_of, steps_of


def entry(path, **settings):
    return BlendEntry(path=path, **settings)


def test_a_blend_without_times_is_one_step_with_a_dataset_per_entry():
    blend = (entry("a"), entry("b"), entry("a"))
    (step,) = steps_of(blend)
    assert (step.entries, step.datasets, step.from_iteration, step.from_tokens) == (blend, (0, 1, 2), None, None)
    assert datasets_of(blend) == blend


def test_a_dataset_of_an_earlier_step_is_the_same_one():
    blend = (entry("a"), entry("b"), entry("c", from_iteration=5), entry("b", from_iteration=5, weight=2.0))
    first, second = steps_of(blend)
    assert (first.datasets, second.datasets) == ((0, 1), (2, 1))
    assert second.from_iteration == 5
    assert [one.path for one in datasets_of(blend)] == ["a", "b", "c"]


def test_the_second_entry_of_a_path_in_a_step_is_the_second_one_of_that_path_before():
    blend = (entry("a"), entry("a"), entry("a", from_tokens=5), entry("a", from_tokens=5), entry("a", from_tokens=9))
    assert [step.datasets for step in steps_of(blend)] == [(0, 1), (0, 1), (0,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"from_iteration": 1}, "blend entry a has from_iteration below 2"),
        ({"from_tokens": 0}, "blend entry a has from_tokens below 1"),
        ({"from_iteration": 3, "from_tokens": 3}, "blend entry a sets from_iteration and from_tokens"),
    ],
)
def test_a_wrong_time_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        entry("a", **settings)


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ((entry("a", from_iteration=3),), "no entry of data.blend counts from the start of the run"),
        ((entry("a"), entry("b", from_iteration=3), entry("c")), "not in the order of their steps"),
        ((entry("a"), entry("b", from_iteration=3), entry("c", from_tokens=9)), "mix from_iteration and from_tokens"),
        ((entry("a"), entry("b", from_iteration=5), entry("c", from_iteration=3)), "a step from 3 behind one from 5"),
        (
            (entry("a"), entry("b", from_tokens=3, weight=1.0), entry("c", from_tokens=3)),
            "data.blend mixes epochs, weight",
        ),
    ],
)
def test_steps_out_of_order_or_of_two_kinds_are_refused(blend, message):
    with pytest.raises(ConfigError, match=message):
        check_blend("data.blend", blend)


def test_steps_may_have_proportions_of_different_kinds():
    check_blend("data.blend", (entry("a", images=1.0), entry("a", weight=1.0, from_iteration=2)))
