"""Read YAML of bounded size and depth: a few bytes of it may stand for billions of values, or contain themselves."""

from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 300_000
"""Longest text of a config file or an override."""
MAX_DEPTH = 50
"""Most collections inside one another."""
MAX_NODES = 20_000
"""Most values and keys, with each alias replaced by what it stands for."""


class _Loader(yaml.SafeLoader):
    """Takes what looks like a number or date but is none that Python can hold as text, so that its key is known."""


def _or_text(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def construct_or_text(loader: _Loader, node: yaml.Node) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, OverflowError, LookupError, AttributeError):
            return node.value

    return construct_or_text


for _tag in (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")):
    _Loader.add_constructor(_tag, _or_text(yaml.SafeLoader.yaml_constructors[_tag]))


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML document, and its nodes with their lines.

    Raises:
        yaml.YAMLError: the text is not valid or is beyond the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters")
    try:
        _check_size(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except (ValueError, OverflowError) as error:  # an escape that is no character
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str) -> None:
    """Go through the events, which are made one by one, and add up what their nodes and aliases stand for."""
    inside: list[tuple[str | None, int, int]] = []  # of each open collection: anchor, nodes before it, depth so far
    known: dict[str, tuple[int, int]] = {}  # nodes and depth by anchor
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth = 0
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, total, 1))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, depth = inside.pop()
            if anchor is not None:
                known[anchor] = (total - before, depth)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _, _ in inside):
                raise _refusal(f"{event.anchor} contains itself", event)
            size, depth = known.get(event.anchor or "", (1, 0))
            total += size
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if inside:
            anchor, before, deepest = inside[-1]
            inside[-1] = (anchor, before, max(deepest, depth + 1))
        if len(inside) + depth > MAX_DEPTH:
            raise _refusal(f"more than {MAX_DEPTH} levels", event)
        if total > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES} values", event)


def _refusal(what: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)
