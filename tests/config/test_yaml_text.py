import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config.yaml_text import MAX_DEPTH, MAX_NODES, read_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_values_are_those_of_yaml(value):
    assert read_yaml(yaml.safe_dump(value))[0] == value


def test_aliases_and_merged_keys_are_followed():
    assert read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")[0] == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def bomb(levels: int) -> str:
    lines = ["l0: &l0 [" + ", ".join("a" * 9) + "]"]
    lines += [f"l{n}: &l{n} [" + ", ".join([f"*l{n - 1}"] * 9) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb(12), f"more than {MAX_NODES} values"),
        ("a: &a [*a]", "a contains itself"),
        ("a: &a\n  b: {c: *a}", "a contains itself"),
        ("[" * 10_000, f"more than {MAX_DEPTH} levels"),
        ("- " * 10_000, f"more than {MAX_DEPTH} levels"),
        ("? " * 10_000, f"more than {MAX_DEPTH} levels"),
        ("\n".join(["l0: &l0 [1]", *(f"l{n}: &l{n} [*l{n - 1}]" for n in range(1, 2000))]), "levels"),
        ("- 1\n" * (MAX_NODES + 1), f"more than {MAX_NODES} values"),
        ("a" * 1_000_000, "characters"),
        ("a: *b", "undefined alias"),
        (r'a: "\UFFFFFFFF"', "too large"),
    ],
)
def test_a_text_that_would_fill_the_memory_or_the_stack_is_refused_at_once(text, problem):
    start = time.process_time()
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml(text)
    assert time.process_time() - start < 5  # at 5 us an event, MAX_NODES take 0.1 to 1 s; unbounded, these never end


@pytest.mark.parametrize("text", ["9" * 5000, "2024-13-45", '!!int ""', "!!float x", "!!bool x", "!!timestamp x"])
def test_what_python_cannot_hold_as_number_or_date_stays_text(text):
    assert isinstance(read_yaml(f"a: {text}")[0]["a"], str)
