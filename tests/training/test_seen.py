from megatron_vlm.training.seen import Seen


def test_steps_add_up_by_name_and_read_back():
    seen = Seen()
    seen.add(["coyo", "mmc4"], [3, 1], [30, 100])
    seen.add(["coyo", "mmc4"], [2, 0], [20, 0])
    assert (seen.samples, seen.tokens) == ({"coyo": 5, "mmc4": 1}, {"coyo": 50, "mmc4": 100})
    again = Seen.from_dict(seen.to_dict())
    again.add(["coyo"], [1], [10])
    assert (again.samples["coyo"], again.tokens["coyo"]) == (6, 60)
    assert seen.samples["coyo"] == 5


def test_datasets_of_another_blend_are_counted_beside_the_first():
    seen = Seen()
    seen.add(["coyo"], [3], [30])
    seen.add(["mmc4"], [1], [10])
    assert seen.samples == {"coyo": 3, "mmc4": 1}
