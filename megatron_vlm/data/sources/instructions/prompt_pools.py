"""Pools of prompts, from YAML: how the raw records of a dataset become questions.

A set names its kind of task, the record fields that fill the slots of a prompt, and several wordings of the prompt; one
of them is chosen for every question. `prompt_pools.yaml` has the 18 sets of VILA's table 10.
"""

import difflib
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from megatron_vlm.config import ConfigError, UsageError, load_section
from megatron_vlm.config.yaml_text import read_yaml
from megatron_vlm.data.documents import PLACEHOLDER

PACKAGED_POOLS = "prompt_pools.yaml"
IMAGE_FIELDS = ("image", "image_base64")
M3IT_IMAGE = ("image_str",)
"""Default field of `image_base64` in a set that has images."""
_KEY = "key"


class Kind(NamedTuple):
    """A kind of task: the slots that its records fill."""

    needed: tuple[str, ...]
    """Slots that every record must fill, besides the image and the answer."""
    answer: str
    """The slot that is trained."""
    optional: tuple[str, ...] = ()
    """Slots that a prompt may use; such a prompt is not used for records that lack them."""
    derived: tuple[str, ...] = ()
    """Further slots that the text of the answer may use."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that a prompt may use."""
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
    """The prompts of one dataset.

    Raises:
        ConfigError: a slot is unknown or has no field, or a prompt uses a slot that does not exist.
    """

    title: str
    """Name of the dataset, as in its paper."""
    kind: Literal["caption", "question", "reading", "multiple_choice", "statement", "translation", "dialog"]
    fields: dict[str, tuple[str, ...]]
    """Record fields for each slot; the first one that a record has is used. A dot leads into an object, and into each
    entry of a list; a name with braces is text that contains fields, as in `train2014/{image_id:012d}.jpg`."""
    prompts: tuple[str, ...]
    """Wordings, with slots in braces. Images come first, or at the place of `<image>`."""
    later_prompts: tuple[str, ...] = ()
    """Wordings of the second and later questions of a conversation; if empty, `prompts` without `<image>`."""
    answer: str = ""
    """The text that is trained; if empty, the answer unchanged."""

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        known = (*IMAGE_FIELDS, _KEY, *kind.slots, kind.answer)
        for slot, names in self.fields.items():
            if slot not in known:
                raise ConfigError(f"fields.{slot}: kind {self.kind} has no such slot", fix=f"use {', '.join(known)}")
            if not names or not all(names):
                raise ConfigError(f"fields.{slot} names no field of a record", fix="give a list of names")
            for name in names:
                check_field_text(name, f"fields.{slot}")
        for slot in (*kind.needed, kind.answer):
            if slot not in self.fields:
                raise ConfigError(f"fields.{slot} is missing, which kind {self.kind} needs", fix=f"add fields.{slot}")
        if not self.prompts:
            raise ConfigError("prompts is empty", fix="give at least one wording")
        usable = [slot for slot in kind.slots if slot in self.fields]
        for key, texts in (("prompts", self.prompts), ("later_prompts", self.later_prompts)):
            for number, text in enumerate(texts):
                slots = check_prompt(text, usable, f"{key}[{number}]")
                if lacking := [slot for slot in kind.needed if slot not in slots]:
                    raise ConfigError(f"{key}[{number}] lacks {{{lacking[0]}}}", fix="use it in every prompt")
        for number, text in enumerate(self.later_prompts):
            if PLACEHOLDER in text:
                raise ConfigError(f"later_prompts[{number}] has {PLACEHOLDER}", fix="images belong to the first one")
        if kind.answer not in check_prompt(self.answer_text, (kind.answer, *kind.derived), "answer") + kind.derived:
            raise ConfigError(f"answer has no {{{kind.answer}}}", fix=f"write {{{kind.answer}}} where it belongs")

    @property
    def answer_text(self) -> str:
        """The text that is trained, with the slot of the answer in braces."""
        return self.answer or f"{{{KINDS[self.kind].answer}}}"


def load_prompt_set(name: str, path: Path | None = None) -> PromptSet:
    """Load one set of a file of prompt pools.

    Args:
        name: key of the set.
        path: YAML file; None: the file of this package.

    Raises:
        ConfigError: the file cannot be read, or the set is wrong; names file, line and key.
        UsageError: the file has no such set.
    """
    return _load(name, path or Path(__file__).with_name(PACKAGED_POOLS))


def prompt_set_names(path: Path) -> list[str]:
    """Return the sets of a file of prompt pools, or an empty list if it cannot be read."""
    try:
        tree = read_yaml(path.read_text())[0]
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


def check_prompt(text: str, slots: Iterable[str], key: str) -> tuple[str, ...]:
    """Return the slots that a text has in braces; ConfigError for any other brace than around one of `slots`."""
    found = []
    for slot, has_format in _braces(text, key):
        if slot not in slots or has_format:
            choice = ", ".join(f"{{{known}}}" for known in slots) or "none"
            raise ConfigError(f"{key}: {{{slot}}} cannot be used here", fix=f"use {choice}; write {{{{ for a brace")
        found.append(slot)
    return tuple(found)


def check_field_text(name: str, key: str) -> None:
    """Raise a ConfigError if a brace in the name of a field is unmatched or does not contain a name."""
    for slot, _ in _braces(name, key):
        if not slot.isidentifier():
            raise ConfigError(f"{key}: {{{slot}}} is not the name of a field", fix="write {image_id}, for example")


def _braces(text: str, key: str) -> list[tuple[str, bool]]:
    """Return the names in braces, each with whether it has a format or a conversion."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}", fix="write {{ and }} for braces") from None
    return [(name, bool(form or conversion)) for _, name, form, conversion in parsed if name is not None]


def fill(text: str, slots: dict[str, str]) -> str:
    """Return `text` with its slots filled."""
    return string.Formatter().vformat(text, (), slots)


def without_image_places(prompt_set: PromptSet) -> tuple[str, ...]:
    """Return the wordings for later questions of a conversation, whose first question has the images."""
    if prompt_set.later_prompts:
        return prompt_set.later_prompts
    texts = prompt_set.prompts
    return tuple(text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "").strip() for text in texts)
