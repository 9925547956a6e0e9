"""Pools of prompts: how the raw records of a data set become questions, from YAML.

A set says which kind of task it is, in which fields of its records the parts of the task are, and several wordings of
the prompt; one of them is chosen for every question. `prompt_pools.yaml` has the 18 sets of VILA's table 10.
"""

import difflib
import string
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from megatron_vlm.config import ConfigError, UsageError, load_section
from megatron_vlm.data.documents import PLACEHOLDER

PACKAGED_POOLS = "prompt_pools.yaml"
IMAGE_FIELDS = ("image", "image_base64")
M3IT_IMAGE = ("image_str",)
"""Where `image_base64` is in a set that has images and does not say."""
_KEY = "key"


class Kind(NamedTuple):
    """A kind of task: which parts a record has of it."""

    needed: tuple[str, ...]
    """Parts that every record must have, besides the image and the answer."""
    answer: str
    """The part that is trained."""
    optional: tuple[str, ...] = ()
    """Parts that a prompt may use; a prompt that does is left out for records that lack them."""
    derived: tuple[str, ...] = ()
    """What the text of the answer may use besides the answer itself."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What a prompt may use."""
        return self.needed + self.optional


KINDS = {
    "caption": Kind((), "caption", ("context",)),
    "question": Kind(("question",), "answer", ("context",)),
    "reading": Kind(("question",), "answer", ("ocr",)),
    "multiple_choice": Kind(("question", "options"), "answer", ("context",), ("letter",)),
    "statement": Kind(("statement",), "answer"),
    "translation": Kind(("source",), "translation", ("language",)),
    "dialog": Kind(("question",), "answer", ("context",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of one data set.

    Raises:
        ConfigError: a part is unknown or has no field, or a prompt uses what there is not.
    """

    title: str
    """Name of the data set, as its paper writes it."""
    kind: Literal["caption", "question", "reading", "multiple_choice", "statement", "translation", "dialog"]
    fields: dict[str, tuple[str, ...]]
    """Where each part is: names of fields, of which a record's first counts. A dot goes inside of an object, and into
    each entry of a list; a name with braces is text with fields in it, as in `train2014/{image_id:012d}.jpg`."""
    prompts: tuple[str, ...]
    """Wordings, with the parts in braces. Images stand in front, or where a prompt has `<image>`."""
    later_prompts: tuple[str, ...] = ()
    """Wordings of a conversation's second and later questions; none: `prompts` without their `<image>`."""
    answer: str = ""
    """The text that is trained; empty: the answer as it is."""

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        known = (*IMAGE_FIELDS, _KEY, *kind.parts, kind.answer)
        for part, names in self.fields.items():
            if part not in known:
                raise ConfigError(f"fields.{part}: kind {self.kind} has no such part", fix=f"use {', '.join(known)}")
            if not names or not all(names):
                raise ConfigError(f"fields.{part} names no field of a record", fix="give a list of names")
            for name in names:
                check_field_text(name, f"fields.{part}")
        for part in (*kind.needed, kind.answer):
            if part not in self.fields:
                raise ConfigError(f"fields.{part} is missing, which kind {self.kind} needs", fix=f"add fields.{part}")
        if not self.prompts:
            raise ConfigError("prompts is empty", fix="give at least one wording")
        usable = [part for part in kind.parts if part in self.fields]
        for key, texts in (("prompts", self.prompts), ("later_prompts", self.later_prompts)):
            for number, text in enumerate(texts):
                parts = check_prompt(text, usable, f"{key}[{number}]")
                if lacking := [part for part in kind.needed if part not in parts]:
                    raise ConfigError(f"{key}[{number}] lacks {{{lacking[0]}}}", fix="every prompt has to ask it")
        for number, text in enumerate(self.later_prompts):
            if PLACEHOLDER in text:
                raise ConfigError(f"later_prompts[{number}] has {PLACEHOLDER}", fix="images belong to the first one")
        if kind.answer not in check_prompt(self.answer_text, (kind.answer, *kind.derived), "answer") + kind.derived:
            raise ConfigError(f"answer has no {{{kind.answer}}}", fix=f"write {{{kind.answer}}} where it belongs")

    @property
    def answer_text(self) -> str:
        """The text that is trained, with the answer in braces."""
        return self.answer or f"{{{KINDS[self.kind].answer}}}"


def load_prompt_set(name: str, path: Path | None = None) -> PromptSet:
    """Load one set of a file of prompt pools.

    Args:
        name: key of the set.
        path: YAML file; None: the one that comes with this package.

    Raises:
        ConfigError: the file cannot be read, or the set is wrong; names file, line and key.
        UsageError: the file has no such set.
    """
    if path is not None:
        return _load(name, path)
    packaged = resources.files("megatron_vlm.data.sources.instructions").joinpath(PACKAGED_POOLS)
    with resources.as_file(packaged) as file:
        return _load(name, file)


def prompt_set_names(path: Path) -> list[str]:
    """Return the sets of a file of prompt pools; nothing if it cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return [str(name) for name in tree] if isinstance(tree, dict) else []


def _load(name: str, path: Path) -> PromptSet:
    try:
        return load_section(PromptSet, path, name)
    except ConfigError:
        names = prompt_set_names(path)
        if not names or name in names:
            raise
        guess = difflib.get_close_matches(name, names, n=1)
        choice = f"did you mean {guess[0]}?" if guess else f"choose from {', '.join(sorted(names))}"
    raise UsageError(f"no prompts for {name!r}", where=path.name, fix=choice)


def check_prompt(text: str, parts: Iterable[str], key: str) -> tuple[str, ...]:
    """Return the parts that a text has in braces.

    Raises:
        ConfigError: a brace is alone, or holds something else than one of `parts`.
    """
    found = []
    for part, has_format in _braces(text, key):
        if part not in parts or has_format:
            choice = ", ".join(f"{{{known}}}" for known in parts) or "none"
            raise ConfigError(f"{key}: {{{part}}} cannot be used here", fix=f"use {choice}; write {{{{ for a brace")
        found.append(part)
    return tuple(found)


def check_field_text(name: str, key: str) -> None:
    """Check the braces in the name of a field.

    Raises:
        ConfigError: a brace is alone, or holds no name.
    """
    for part, _ in _braces(name, key):
        if not part.isidentifier():
            raise ConfigError(f"{key}: {{{part}}} is not the name of a field", fix="write {image_id}, for example")


def _braces(text: str, key: str) -> list[tuple[str, bool]]:
    """Return what stands in braces, and whether there is a format or a conversion with it."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}", fix="write {{ and }} for braces") from None
    return [(name, bool(form or conversion)) for _, name, form, conversion in parsed if name is not None]


def fill(text: str, parts: dict[str, str]) -> str:
    """Return `text` with the parts in place of their names in braces."""
    return "".join(
        literal + (parts[name] if name is not None else "") for literal, name, _, _ in string.Formatter().parse(text)
    )


def without_image_places(prompt_set: PromptSet) -> tuple[str, ...]:
    """Return the wordings for the later questions of a conversation, whose images were shown with the first one."""
    if prompt_set.later_prompts:
        return prompt_set.later_prompts
    shortened = (text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "").strip() for text in prompt_set.prompts)
    return tuple(shortened)
