import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError, config_to_dict, load_config, save_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    lr: float
    steps: int = 3
    warm_up: bool = False
    style: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"inner.steps={self.steps} is negative", fix="use 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    path: str
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    items: tuple[Item, ...] = ()
    size: tuple[int, int] = (1, 2)
    scales: dict[str, float] = field(default_factory=dict)
    rest: Inner | None = None


WHOLE = "name: run\ninner:\n  lr: 0.1\n"


@pytest.fixture
def load(tmp_path):
    """Load Outer from YAML text: `load(text, *overrides)`; the file is outer.yaml."""

    def load_text(text, *overrides):
        (tmp_path / "outer.yaml").write_text(text)
        return load_config(Outer, tmp_path / "outer.yaml", overrides)

    return load_text


def test_values_of_the_file_go_before_defaults(load):
    config = load("name: run\ninner:\n  lr: 0.1\n  steps: 7\n")
    assert (config.name, config.inner) == ("run", Inner(lr=0.1, steps=7))


def test_override_goes_before_the_file(load):
    assert load(WHOLE, "inner.lr=0.5", "inner.warm_up=true", "name=other") == Outer(
        name="other", inner=Inner(lr=0.5, warm_up=True)
    )


def test_last_of_two_overrides_counts(load):
    assert load(WHOLE, "inner.steps=5", "inner.steps=6").inner.steps == 6


def test_override_makes_a_section_that_the_file_leaves_out(load):
    assert load("name: run\n", "inner.lr=1").inner == Inner(lr=1.0)


def test_override_replaces_a_whole_list(load):
    config = load(WHOLE + "items: [{path: a}, {path: b}]\n", "items=[{path: c, weight: 2}]")
    assert config.items == (Item(path="c", weight=2.0),)


def test_base_file_lies_under_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ninner: {lr: 0.1, steps: 9}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text("base: ../base.yaml\nname: top\ninner: {steps: 4}\n")
    assert load_config(Outer, tmp_path / "sub" / "top.yaml") == Outer(name="top", inner=Inner(lr=0.1, steps=4))


def test_bases_may_have_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ninner: {lr: 1, steps: 1}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ninner: {steps: 2}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nname: c\n")
    assert load_config(Outer, tmp_path / "c.yaml") == Outer(name="c", inner=Inner(lr=1.0, steps=2))


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", "'1e-5'"])
def test_number_may_be_written_as_the_field_writes_it(load, text):
    assert load(f"name: run\ninner:\n  lr: {text}\n").inner.lr == 1e-5


def test_whole_float_is_taken_for_an_integer(load):
    assert load(WHOLE, "inner.steps=4.0").inner.steps == 4


def test_null_is_taken_where_the_field_may_be_empty(load):
    config = load(WHOLE + "items: [{path: a, weight: null}]\nrest: null\n")
    assert (config.items[0].weight, config.rest) == (None, None)


def test_mapping_keeps_its_keys(load):
    assert load(WHOLE + "scales: {vision: 1e-1, text: 2}\n").scales == {"vision": 0.1, "text": 2.0}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "name: run\ninner:\n  lr: 1\n  stepz: 3\n",
            r"unknown key inner.stepz .*outer.yaml:4.*did you mean inner.steps",
        ),
        ("name: run\nnmae: x\ninner: {lr: 1}\n", r"unknown key nmae .*outer.yaml:2.*did you mean name"),
        (WHOLE + "items:\n  - path: a\n  - pth: b\n", r"unknown key items\[1\].pth .*outer.yaml:6.*items\[1\].path"),
        (WHOLE + "zzz: 1\n", r"unknown key zzz .*outer.yaml:4.*keys here: name, inner"),
    ],
)
def test_unknown_key_is_named_with_its_line_and_the_nearest_key(load, text, line):
    with pytest.raises(ConfigError, match=line):
        load(text)


def test_unknown_key_of_an_override_names_the_override(load):
    with pytest.raises(ConfigError, match=r"unknown key inner.stpes \(override inner.stpes=3\).*inner.steps"):
        load(WHOLE, "inner.stpes=3")


@pytest.mark.parametrize("text", ["[a.tar]", "[{pth: a}]"])
def test_wrong_list_of_an_override_names_the_override_and_not_the_file(load, text):
    with pytest.raises(ConfigError, match=r"items\[0\].*\(override items=") as caught:
        load(WHOLE + "items:\n  - path: a\n", f"items={text}")
    assert "outer.yaml" not in str(caught.value)


def test_unknown_key_of_a_base_names_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text(WHOLE + "nme: x\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\n")
    with pytest.raises(ConfigError, match=r"unknown key nme .*base.yaml:4"):
        load_config(Outer, tmp_path / "top.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.lr=fast", "inner.lr='fast' is not a number"),
        ("inner.lr=true", "inner.lr=True is not a number"),
        ("inner.lr=[1]", r"inner.lr=\[1\] is not a number"),
        ("inner.lr=.nan", "inner.lr=nan is not a finite number"),
        ("inner.lr=-.inf", "inner.lr=-inf is not a finite number"),
        ("inner.steps=1.5", "inner.steps=1.5 is not int"),
        ("inner.steps=true", "inner.steps=True is not int"),
        ("inner.steps='3'", "inner.steps='3' is not int"),
        ("inner.warm_up=1", "inner.warm_up=1 is not bool"),
        ("inner.style=square", "inner.style='square' is not one of cosine, linear"),
        ("inner.style=[a]", "inner.style=.* is not one of cosine, linear"),
        ("name=3", "name=3 is not str"),
        ("name=null", "name=None is not str"),
        ("inner=3", "inner=3 is not a section"),
        ("items=a", "items='a' is not a list"),
        ("size=[1]", r"size=\[1\] is not a list of 2"),
        ("scales=[1]", r"scales=\[1\] is not a mapping"),
        ("items=[{path: a, weight: x}]", r"items\[0\].weight='x' is not a number"),
    ],
)
def test_value_of_a_wrong_type_is_named_with_what_was_expected(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(WHOLE, override)


def test_wrong_type_names_file_and_line(load):
    with pytest.raises(ConfigError, match=r"\(.*outer.yaml:4\); fix: give inner.steps as int"):
        load("name: run\ninner:\n  lr: 1\n  steps: many\n")


@pytest.mark.parametrize(
    ("text", "key"), [("name: run\n", "inner"), ("inner: {lr: 1}\n", "name"), ("name: a\ninner:\n", "inner.lr")]
)
def test_missing_value_is_named(load, text, key):
    with pytest.raises(ConfigError, match=f"missing value {key} .*fix: set {key}"):
        load(text)


def test_section_that_contradicts_itself_is_named_with_its_line(load):
    with pytest.raises(ConfigError, match=r"inner.steps=-1 is negative \(.*outer.yaml:2\); fix: use 0 or more"):
        load("name: run\ninner:\n  lr: 1\n  steps: -1\n")


def test_key_that_stands_twice_is_refused(load):
    with pytest.raises(ConfigError, match=r"key inner.lr is set twice .*outer.yaml:4"):
        load("name: run\ninner:\n  lr: 1\n  lr: 2\n")


@pytest.mark.parametrize("override", ["inner.lr", "=3", "inner"])
def test_override_without_key_or_value_is_refused(load, override):
    with pytest.raises(ConfigError, match="is not section.key=value"):
        load(WHOLE, override)


def test_override_that_is_no_yaml_is_refused(load):
    with pytest.raises(ConfigError, match=r"override .* is not valid YAML.*quote the value"):
        load(WHOLE, "name=[a")


def test_override_below_a_single_value_is_refused(load):
    with pytest.raises(ConfigError, match="override name.first: name is not a section"):
        load(WHOLE, "name.first=a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\ninner: {}\n", r"is not valid YAML: expected .* \(.*outer.yaml:2\)"),
        ("\tname: a\n", "is not valid YAML"),
        ("- a\n- b\n", "is not a mapping"),
        ("just text\n", "is not a mapping"),
    ],
)
def test_file_that_is_no_mapping_is_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_empty_file_misses_every_value(load):
    with pytest.raises(ConfigError, match="missing value name"):
        load("")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist \(.*nowhere.yaml\)"):
        load_config(Outer, tmp_path / "nowhere.yaml")


def test_missing_base_is_named(tmp_path):
    (tmp_path / "top.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"does not exist \(.*gone.yaml\)"):
        load_config(Outer, tmp_path / "top.yaml")


def test_circle_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="extend each other in a circle"):
        load_config(Outer, tmp_path / "a.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "outer.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read.*outer.yaml"):
        load_config(Outer, path)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
integers = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(
    Inner, lr=numbers, steps=st.integers(0, 10**9), warm_up=st.booleans(), style=st.sampled_from(["cosine", "linear"])
)
configs = st.builds(
    Outer,
    name=texts,
    inner=inners,
    items=st.lists(st.builds(Item, path=texts, weight=st.none() | numbers), max_size=3).map(tuple),
    size=st.tuples(integers, integers),
    scales=st.dictionaries(st.text(), numbers, max_size=3),
    rest=st.none() | inners,
)


@given(configs)
def test_saved_config_is_read_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(Outer, path) == config


def test_plain_dict_has_lists_for_tuples():
    config = Outer(name="a", inner=Inner(lr=1.0), items=(Item(path="p"),))
    assert config_to_dict(config) == {
        "name": "a",
        "inner": {"lr": 1.0, "steps": 3, "warm_up": False, "style": "cosine"},
        "items": [{"path": "p", "weight": None}],
        "size": [1, 2],
        "scales": {},
        "rest": None,
    }


def test_loaded_config_cannot_change(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(WHOLE).name = "other"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: run\ninner: {lr: 1}\nitems: &a [*a]\n", r"a contains itself \(.*outer.yaml:3\)"),
        (f"name: run\ninner:\n  lr: 1\n  steps: {'9' * 5000}\n", r"inner.steps='9+\.\.\. is not int .*outer.yaml:4"),
        (f"name: run\ninner: {{lr: {'9' * 5000}}}\n", r"inner.lr='9+\.\.\. is not a finite number"),
        (f"name: run\ninner: {{lr: 1, steps: 0x{'f' * 5000}}}\n", "inner.steps=a huge number is not an integer of at"),
        ("name: run\ninner: {lr: 1, steps: 1.0e+30}\n", r"inner.steps=1\d+ is not an integer of at most 64 bits"),
        ('name: "a\\0b"\ninner: {lr: 1}\n', r"name='a\\x00b' is not text without NUL"),
        ('name: "\\ud800"\ninner: {lr: 1}\n', "is not text without NUL and surrogates"),
        ('base: "a\\0b"\n', r"base='a\\x00b' is not the path of a file \(.*outer.yaml:1\)"),
        ("base: [1]\n", "is not the path of a file"),
    ],
)
def test_a_hostile_value_is_named_by_its_key_in_a_short_line(load, text, line):
    with pytest.raises(ConfigError, match=line) as caught:
        load(text)
    assert len(str(caught.value)) < 600  # with the path of the test's folder


@pytest.mark.parametrize("text", ["[" * 10_000, "&a [*a]", f"0x{'f' * 5000}"])
def test_a_hostile_override_is_refused_in_a_short_line(load, text):
    with pytest.raises(ConfigError, match=r"inner.steps") as caught:
        load(WHOLE, f"inner.steps={text}")
    assert len(str(caught.value)) < 400


def test_a_config_without_an_end_is_not_read_to_it():
    with pytest.raises(ConfigError, match="characters"):
        load_config(Outer, "/dev/zero")
