"""The functions that a module of `convert/families/` offers; it is found by the `model_type` of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig, UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.history import History
from megatron_vlm.convert.rules import Rule
from megatron_vlm.data.loading.pixels import Aspect
from megatron_vlm.data.text.templates import Template
from megatron_vlm.data.text.tokenizer import Tokenizer

FAMILIES = "megatron_vlm.convert.families"
Part = Literal["language", "vision", "model"]
NO_FORMAT = "no format holds such a model: keep its checkpoint, which generate and evaluate read"
"""What to do where nothing can be exported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a folder consists of."""

    settings: dict[str, Any]
    """config.json, with the settings of parts that have a file of their own."""
    language: Mapping[str, Any]
    """Settings of the language model, if there is one."""
    weights: Mapping[str, Path]
    """Folders with weights, by the prefix that the names of their tensors get, as in `HFFolder`."""
    tokenizer: Path
    """Folder of the tokenizer's files."""
    processor: Path
    """Folder of preprocessor_config.json."""

    @classmethod
    def of_one_folder(cls, path: Path, settings: dict[str, Any]) -> "Parts":
        """Return those of a folder that has everything in itself."""
        # That of a whole model has a section for its decoder.
        language = settings.get("text_config", settings)
        return cls(settings=settings, language=language, weights={"": path}, tokenizer=path, processor=path)


class Family(Protocol):
    """A language model, a tower, or a whole model: the names of its tensors, and its settings in both directions."""

    PART: Part
    """The section of the config that it converts: `model.language`, `model.vision`, or all of `model`."""
    MODEL_TYPES: tuple[str, ...]
    """Values of `model_type` in config.json, or of its first architecture, which counts more."""

    def renames(self, settings: dict[str, Any]) -> Sequence[tuple[str, str]]:
        """Return (regular expression, replacement) pairs that turn other versions' names into those of the table.

        Args:
            settings: as in `config_from_hf`.
        """

    def rules(self, config: Any) -> list[Rule]:
        """Return the table of tensors for these settings.

        In the format of a whole model, `folder/name` is the tensor `name` in the weights of a sub-folder.
        """

    def unused(self, config: Any) -> tuple[str, ...]:
        """Return regular expressions for tensors that a folder may hold in addition to the table."""

    def constants(self, config: Any) -> Mapping[str, Tensor]:
        """Return tensors that a folder must have and our model lacks, with values that have no effect."""

    def config_from_hf(self, settings: dict[str, Any], *, where: str, **chosen: Any) -> Any:
        """Return our settings.

        Args:
            settings: config.json, or its section about this part; of a whole model, those of its `Parts`.
            where: the file, for messages.
            chosen: fields that override the file, e.g. `vocab_size` from the tokenizer.

        Raises:
            CheckpointError: our model does not support something in the settings.
        """

    def config_to_hf(self, config: Any) -> dict[str, Any]:
        """Return config.json, or its section about this part.

        Raises:
            CheckpointError: the family does not support something in our settings.
        """


class TowerFamily(Family, Protocol):
    """A family of vision towers (PART "vision"), named after the type of the tower."""

    FREE: frozenset[str]
    """Fields that a training may choose freely: they affect neither a tensor nor what the imported weights compute."""
    VILA_TYPE: str
    """`model_type` of the tower's folder within a VILA, whose family may be another one than this."""

    def reason_against_llava(self, config: Any) -> str | None:
        """Return why transformers' Llava cannot compute with this tower; None if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the decoder of an export is quantised, for its card."""

    what: str
    loaded_by: str
    """The programs that load it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What the card of an export tells."""

    model: ModelConfig
    dtype: torch.dtype
    """Of the weights."""
    image_aspect: Aspect
    history: History = field(default_factory=History)
    """How the model was trained."""
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving(Described):
    """What a folder needs in addition to its weights to be served."""

    tokenizer: Tokenizer
    template: Template
    system: object
    """System prompt, as in `render_conversation`."""


class ModelFamily(Family, Protocol):
    """A family of whole models (PART "model"), which is also an export format."""

    ARCHITECTURE: str
    """Class that loads the folder."""

    def find_parts(self, path: Path, settings: dict[str, Any], tower: Path | None) -> Parts:
        """Return what a folder consists of.

        Args:
            path: the folder.
            settings: its config.json.
            tower: folder of the tower that it names, if that is not in it.

        Raises:
            CheckpointError: a file is missing or damaged.
        """

    def reason_against(self, model: ModelConfig) -> str | None:
        """Return why the format cannot hold a model, as in "a tower of type ... does not fit ..."; None if it can."""

    def write_settings(self, folder: Path, serving: Serving) -> None:
        """Write all files except the weights: config.json, tokenizer, processor, chat template, model card."""


def find_family(model_type: str | None, part: Part, where: str) -> Family:
    """Return the family of a folder.

    Args:
        model_type: as its config.json has it; without one, its first architecture.
        part: the kind of family that is wanted.
        where: the file, for messages.

    Raises:
        CheckpointError: no family of this kind has this type; lists the known types.
    """
    types = {kind: family for family in _families(part).values() for kind in family.MODEL_TYPES}
    if model_type not in types:
        raise CheckpointError(
            f"model_type is {model_type}, not {' or '.join(types)}", where=where, fix="check the path"
        )
    return types[model_type]


def family_of(settings: Mapping[str, Any], part: Part, where: str) -> Family:
    """Return the family of a folder by its config.json; arguments and errors as in `find_family`."""
    architecture = next(iter(settings.get("architectures") or ()), None)
    known = [family for family in _families(part).values() if architecture in family.MODEL_TYPES]
    return known[0] if known else find_family(settings.get("model_type") or architecture, part, where)


def decoder_family() -> Family:
    """Return the family of all decoders."""
    return find_family("llama", "language", "model.language")


def find_tower_family(type: str) -> TowerFamily:
    """Return the family that converts towers of this type; its module has the same name.

    Raises:
        CheckpointError: there is none; lists the towers that can be converted.
    """
    families = _families("vision")
    if type not in families:
        types = [name for name in families if name in module_names("megatron_vlm.config.towers")]
        raise CheckpointError(
            f"a tower of type {type} has no conversion", where="model.vision", fix=f"use {', '.join(types)}"
        )
    return cast(TowerFamily, families[type])


def find_format(name: str) -> ModelFamily:
    """Return the family of an export format, whose name has a dash for every underscore of the module's.

    Raises:
        UsageError: no family of whole models has this name; lists those that exist.
    """
    if name not in format_names():
        raise UsageError(f"unknown export format {name!r}", fix=f"choose one of {', '.join(format_names())}")
    return cast(ModelFamily, _families("model")[name.replace("-", "_")])


def refuse_tower(path: Path, tower: Path | None) -> None:
    """Raise UsageError if a tower is named beside a folder that has one of its own."""
    if tower is not None:
        raise UsageError(f"{path} has a tower of its own", fix=f"leave out {tower}")


def check_fits(name: str, model: ModelConfig) -> None:
    """Check that an export format can hold a model.

    Raises:
        CheckpointError: it cannot; names those that can.
        UsageError: there is no such format.
    """
    reason = find_format(name).reason_against(model)
    if reason is None:
        return
    others = formats_that_hold(model)
    fix = f"export to the format {' or '.join(others)}" if others else NO_FORMAT
    raise CheckpointError(reason, where="model", fix=fix)


def formats_that_hold(model: ModelConfig) -> list[str]:
    """Return the names of the families of whole models that can hold a model."""
    return [name for name in format_names() if find_format(name).reason_against(model) is None]


def format_names() -> tuple[str, ...]:
    """Return the names of the families of whole models, each of which is an export format."""
    return tuple(module.replace("_", "-") for module in _families("model"))


def _families(part: Part) -> dict[str, Family]:
    found = {name: cast(Family, find_module(FAMILIES, name, "family")) for name in module_names(FAMILIES)}
    return {name: family for name, family in found.items() if family.PART == part}
