"""What a module of `convert/families/` offers, and how it is found: by the `model_type` of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig, UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.rules import Rule
from megatron_vlm.data.loading.pixels import Aspect
from megatron_vlm.data.text.templates import Template
from megatron_vlm.data.text.tokenizer import Tokenizer

FAMILIES = "megatron_vlm.convert.families"
Part = Literal["language", "vision", "model"]


class Family(Protocol):
    """A language model, a tower, or a model of both: names of its tensors and its settings, both ways."""

    PART: Part
    """What it is: `model.language`, `model.vision`, or the whole `model` section."""
    MODEL_TYPES: tuple[str, ...]
    """Values of `model_type` in the config.json of such a folder."""
    RENAMES: Sequence[tuple[str, str]]
    """Regular expressions that turn names of other versions into those of the table."""

    def rules(self, config: Any) -> list[Rule]:
        """Return the table of tensors for the settings of the part."""

    def unused(self, config: Any) -> tuple[str, ...]:
        """Return regular expressions of tensors that a folder may hold beside those of the table."""

    def constants(self, config: Any) -> Mapping[str, Tensor]:
        """Return tensors that a folder must have and we do not, with values that change nothing."""

    def config_from_hf(self, settings: dict[str, Any], *, where: str, **chosen: Any) -> Any:
        """Return our settings of the part.

        Args:
            settings: config.json, or the section of it that describes the part.
            where: the file, for messages.
            chosen: fields that go before what the file says, e.g. `vocab_size` as the tokenizer has it.

        Raises:
            CheckpointError: the folder has something that our part lacks.
        """

    def config_to_hf(self, config: Any) -> dict[str, Any]:
        """Return config.json, or the section of it that describes the part.

        Raises:
            CheckpointError: the part has something that the family lacks.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a folder needs beside its weights to be served."""

    model: ModelConfig
    dtype: torch.dtype
    """Of the weights."""
    tokenizer_path: Path
    tokenizer: Tokenizer
    image_aspect: Aspect
    template: Template
    system: object
    """System prompt, as in `render_conversation`."""


class ModelFamily(Family, Protocol):
    """A family with PART "model": it is also a format to export to."""

    ARCHITECTURE: str
    """Class of transformers that loads the folder."""

    def write_settings(self, folder: Path, serving: Serving) -> None:
        """Write every file but the weights: config.json, tokenizer, processor, chat template."""


def find_family(model_type: str | None, part: Part, where: str) -> Family:
    """Return the family of a folder.

    Args:
        model_type: as its config.json has it.
        part: what the folder shall hold.
        where: the file, for messages.

    Raises:
        CheckpointError: no family of such a part has this type; lists the types that there are.
    """
    types = {kind: family for family in _families(part).values() for kind in family.MODEL_TYPES}
    if model_type not in types:
        raise CheckpointError(
            f"model_type is {model_type}, not {' or '.join(types)}", where=where, fix="check the path"
        )
    return types[model_type]


def find_tower_family(type: str) -> Family:
    """Return the family that converts the towers of this type; the two have the same name.

    Raises:
        CheckpointError: no family does; lists the towers that can be converted.
    """
    families = _families("vision")
    if type not in families:
        raise CheckpointError(
            f"a tower of type {type} has no conversion", where="model.vision", fix=f"use {', '.join(families)}"
        )
    return families[type]


def find_format(name: str) -> ModelFamily:
    """Return the family that an export is written for.

    Raises:
        UsageError: there is none of whole models; lists those that there are.
    """
    families = _families("model")
    if name not in families:
        raise UsageError(f"unknown export format {name!r}", fix=f"choose one of {', '.join(families)}")
    return cast(ModelFamily, families[name])


def _families(part: Part) -> dict[str, Family]:
    found = {name: cast(Family, find_module(FAMILIES, name, "family")) for name in module_names(FAMILIES)}
    return {name: family for name, family in found.items() if family.PART == part}
