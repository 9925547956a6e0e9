"""Quantise the matrices of the decoder on their way into an exported folder, one layer at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from megatron_vlm.config import CheckpointError, LanguageConfig, UsageError
from megatron_vlm.convert.family import Quantization
from megatron_vlm.convert.folder import CONFIG_NAME, read_json, write_json
from megatron_vlm.convert.quantize.calibration import read_calibration
from megatron_vlm.convert.quantize.decoder_layer import LINEARS, DecoderLayer
from megatron_vlm.convert.quantize.groups import Quantised
from megatron_vlm.convert.quantize.layout import Layout, find_layout
from megatron_vlm.convert.quantize.pickle_writer import PickleWriter
from megatron_vlm.convert.quantize.search import Recipe, quantise_layer
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.weights_writer import Announced, WeightsWriter
from megatron_vlm.data.text.tokenizer import Tokenizer

GROUP_SIZES = (128, 64, 32)
_LANGUAGE = "model.language_model."
_LAYERS = _LANGUAGE + "decoder.layers."
_EMBEDDING = _LANGUAGE + "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How an export is quantised."""

    method: str
    """METHOD of a layout."""
    calibration: Path
    """A text like those that the model will see, in UTF-8."""
    layout: str | None = None
    """Name of a layout; None: the method's first."""
    group_size: int = GROUP_SIZES[0]
    """Inputs that share a scale."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where layers are computed."""


class Source(Protocol):
    """An export that is not quantised."""

    def read(self, rule: Rule, layer: int | None) -> Iterable[tuple[str, Tensor]]:
        """Return the tensors of a rule as the checkpoint has them, by their names."""

    def announce(self) -> list[Announced]:
        """Describe every tensor."""

    def tensors(self, rules: Sequence[Rule]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of some rules, and those that have no rule."""


class Writer(Protocol):
    """Writes the tensors of a folder: a `WeightsWriter` or a `PickleWriter`."""

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all announced tensors."""

    def verify(self) -> None:
        """Read everything back and compare it with what was written."""


class Quantizer:
    """What quantises an export.

    Args:
        options: how.
        language: settings of the decoder.
        rules: the table of the export.
        tokenizer: of the model.

    Raises:
        UsageError: there is no such method or layout, or it cannot hold a matrix of the decoder.
        DataError: the calibration text cannot be read or is too short.
    """

    def __init__(
        self, options: QuantizeOptions, language: LanguageConfig, rules: Sequence[Rule], tokenizer: Tokenizer
    ) -> None:
        self.options, self.language = options, language
        self.layout = find_layout(options.method, options.layout)
        self.layers = [rule for rule in rules if rule.key.startswith(_LAYERS)]
        self.rest = [rule for rule in rules if not rule.key.startswith(_LAYERS)]
        for rule in self.layers:
            for name, shape in zip(rule.names, rule.their_shapes(), strict=True):
                if _is_matrix(name):
                    _check_shape(name.removesuffix(".weight"), shape, options, self.layout)
        if self.layout.FILE is not None and self.folder == PurePosixPath():
            raise UsageError(
                f"layout {options.layout} is a file in the folder of the language model, which this format has not",
                fix="add --format vila",
            )
        self.ids = read_calibration(options.calibration, tokenizer)

    @property
    def folder(self) -> PurePosixPath:
        """Folder of the decoder within the exported one."""
        return PurePosixPath(self.layers[0].names[0]).parent

    def choose_dtype(self, usual: torch.dtype, *, is_asked: bool) -> torch.dtype:
        """Return the type of scales and of the tensors that are not quantised.

        Args:
            usual: that of an export that is not quantised.
            is_asked: whether the user named it.

        Raises:
            UsageError: the layout has another one than the user named.
        """
        needed = self.layout.DTYPE or usual
        if is_asked and needed != usual:
            names = [str(one).removeprefix("torch.") for one in (needed, usual)]
            raise UsageError(
                f"a folder quantised by {self.options.method} is {names[0]}, not {names[1]}",
                fix=f"omit --dtype, or use --dtype {names[0]}",
            )
        return needed

    @property
    def quantization(self) -> Quantization:
        """What the card says."""
        how = f"{self.options.method}, groups of {self.options.group_size}, {self.ids.numel():,} tokens of calibration"
        return Quantization(what=f"matrices of the decoder in 4 bits ({how})", loaded_by=self.layout.LOADED_BY)

    def write_settings(self, folder: Path) -> None:
        """Tell config.json of the decoder how it is quantised."""
        outside = (name for rule in self.rest if not rule.key.startswith(_LANGUAGE) for name in rule.names)
        others = dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in outside if "/" not in name)
        settings = self.layout.settings(self.options.group_size, ["lm_head", *others])
        path = folder / self.folder / CONFIG_NAME
        if settings:
            write_json(path, {**read_json(path), "quantization_config": settings})


@dataclass(frozen=True, slots=True)
class QuantizedExport:
    """The tensors of a quantised folder."""

    quantizer: Quantizer
    source: Source
    dtype: torch.dtype
    """Of scales, and of tensors that are not quantised."""

    def announce(self) -> list[Announced]:
        """Describe every tensor."""
        in_layers = {name for rule in self.quantizer.layers for layer in rule.layers for name in rule.names_of(layer)}
        announced = []
        for entry in self.source.announce():
            if entry.name in in_layers and _is_matrix(entry.name):
                empty = {"values": entry.shape, "zeros": _groups_of(entry.shape, self.quantizer.options.group_size)}
                values, zeros = (torch.empty(shape, dtype=torch.uint8, device="meta") for shape in empty.values())
                packed = self._packed(entry.name, Quantised(values, zeros.to(self.dtype), zeros))
                announced += [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in packed]
            else:
                announced.append(entry)
        return announced

    def writer(self, folder: Path, max_shard_bytes: int) -> Writer:
        """Return what writes the tensors."""
        options, file = self.quantizer.options, self.quantizer.layout.FILE
        if file is None:
            return WeightsWriter(folder, self.announce(), max_shard_bytes)
        name = file.format(bits=self.quantizer.layout.GRID.bits, group_size=options.group_size)
        return PickleWriter(folder, self.quantizer.folder / name, self.announce(), max_shard_bytes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor: what is not quantised, then the layers, each made when it is asked for.

        Raises:
            CheckpointError: a value is too large for the type of the folder.
        """
        yield from self.source.tensors(self.quantizer.rest)
        layer_of = DecoderLayer(self.quantizer.language)
        recipe = Recipe(grid=self.quantizer.layout.GRID, group_size=self.quantizer.options.group_size)
        hidden = self._embed()
        for layer in range(self.quantizer.language.num_layers):
            read = dict(entry for rule in self.quantizer.layers for entry in self.source.read(rule, layer))
            weights = {
                _module(name): tensor.to(self.quantizer.options.device, torch.float32) for name, tensor in read.items()
            }
            norms, matrices = quantise_layer(layer_of, weights, hidden, recipe, self.dtype)
            for name in read:
                if _is_matrix(name):
                    for packed, tensor in self._packed(name, matrices[_module(name)]):
                        yield packed, self._checked(packed, tensor.cpu())
                else:
                    yield name, self._checked(name, norms[_module(name)].to("cpu", self.dtype))

    def _embed(self) -> Tensor:
        (rule,) = (rule for rule in self.quantizer.rest if rule.key == _EMBEDDING)
        ((_, rows),) = self.source.read(rule, None)
        return rows[self.quantizer.ids].float()

    def _packed(self, name: str, weight: Quantised) -> Iterator[tuple[str, Tensor]]:
        module = name.removesuffix("weight")
        return ((module + suffix, tensor) for suffix, tensor in self.quantizer.layout.pack(weight).items())

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} has values that are not finite in {str(self.dtype).removeprefix('torch.')}",
                fix="check the checkpoint, or use --quantize compressed-tensors --dtype bfloat16",
            )
        return tensor


def _module(name: str) -> str:
    return name.split(".")[-2]


def _is_matrix(name: str) -> bool:
    return _module(name) in LINEARS


def _groups_of(shape: tuple[int, ...], group_size: int) -> tuple[int, int]:
    return shape[0], shape[1] // group_size


def _check_shape(name: str, shape: tuple[int, ...], options: QuantizeOptions, layout: Layout) -> None:
    outputs, inputs = shape
    if inputs % options.group_size:
        fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        fix = f"choose --group-size {' or '.join(fitting)}" if fitting else "no size of groups divides them"
        raise UsageError(f"{name} has {inputs} inputs, not a multiple of the group size {options.group_size}", fix=fix)
    if inputs % layout.INPUTS or outputs % layout.OUTPUTS:
        raise UsageError(
            f"{name} has {outputs} outputs of {inputs} inputs; the layout takes multiples of {layout.OUTPUTS} and "
            f"{layout.INPUTS}",
            fix="choose another layout",
        )
