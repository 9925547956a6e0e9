import pytest

from megatron_vlm.config import BlendEntry, ConfigError, DataConfig


def data(*entries, **settings):
    return DataConfig(**{"tokenizer": "t", "seq_length": 4096, **settings}, blend=entries)


@pytest.mark.parametrize("proportion", [{}, {"weight": 0.5}, {"epochs": 2}, {"images": 1}])
def test_one_proportion_or_none_is_accepted(proportion):
    assert BlendEntry(path="a", **proportion).path == "a"


def test_two_proportions_are_refused():
    with pytest.raises(ConfigError, match="blend entry a sets weight and images; fix: keep one"):
        BlendEntry(path="a", weight=1, images=1)


@pytest.mark.parametrize("name", ["weight", "epochs", "images"])
@pytest.mark.parametrize("value", [0, -1])
def test_proportion_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"blend entry a has {name} <= 0"):
        BlendEntry(path="a", **{name: value})


def test_empty_blend_is_refused():
    with pytest.raises(ConfigError, match="data.blend is empty"):
        data()


def test_proportions_of_two_kinds_are_refused():
    with pytest.raises(ConfigError, match="data.blend mixes epochs, images"):
        data(BlendEntry(path="a", images=1), BlendEntry(path="b", epochs=1))


def test_entry_without_a_proportion_goes_with_epochs():
    assert len(data(BlendEntry(path="a"), BlendEntry(path="b", epochs=2)).blend) == 2


@pytest.mark.parametrize("seq_length", [0, -4096])
def test_row_without_a_length_is_refused(seq_length):
    with pytest.raises(ConfigError, match=f"data.seq_length={seq_length} is not positive"):
        data(BlendEntry(path="a"), seq_length=seq_length)


def test_negative_number_of_loader_processes_is_refused():
    with pytest.raises(ConfigError, match="data.num_workers=-1 is negative"):
        data(BlendEntry(path="a"), num_workers=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_multiple": 0}, "data.sample_multiple=0 is not positive"),
        ({"max_images_per_row": 0}, "data.max_images_per_row=0 is not positive"),
        ({"sample_multiple": 24}, r"seq_length=4096 is not a multiple of .*=24; fix: set data.seq_length=4080"),
        ({"seq_length": 8, "sample_multiple": 16}, "fix: set data.seq_length=16"),
        ({"length_clustering": True}, "but data.packing puts several into a row; fix: turn one of them off"),
        (
            {"packing": False, "length_clustering": True, "length_multiple": 40, "sample_multiple": 16},
            r"length_multiple=40 is not a multiple of .*=16; fix: set data.length_multiple=48",
        ),
    ],
)
def test_multiples_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        data(BlendEntry(path="a"), **settings)


def test_proportions_of_two_kinds_in_the_validation_are_refused():
    with pytest.raises(ConfigError, match="data.validation mixes epochs, weight"):
        DataConfig(
            tokenizer="t",
            blend=(BlendEntry(path="a"),),
            validation=(BlendEntry(path="b", weight=1), BlendEntry(path="c", epochs=1)),
            seq_length=8,
        )
