"""Export a checkpoint of any parallel layout, tensor by tensor, as a folder that transformers loads."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.checkpoint.tensors import list_tensors
from megatron_vlm.checkpoint.verify import check_whole
from megatron_vlm.config import AdapterConfig, CheckpointError
from megatron_vlm.convert.adapter import adapter_shapes, read_merged
from megatron_vlm.convert.differences import describe_differences
from megatron_vlm.convert.family import Serving, check_fits, find_format
from megatron_vlm.convert.history import read_history
from megatron_vlm.convert.output import check_output
from megatron_vlm.convert.quantize.export import QuantizedExport, QuantizeOptions, Quantizer, Writer
from megatron_vlm.convert.rules import Rule, Vocabulary
from megatron_vlm.convert.weights_writer import Announced, WeightsWriter
from megatron_vlm.data.text.templates import DEFAULT_SYSTEM, find_template
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.parallel.groups import single_process
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, folder_beside, storage_errors

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9
_FIX = "make room or name another folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Settings of an export."""

    format: str = "llava"
    """Name of a family of whole models in `convert/families/`, or of a module of `convert/formats/`."""
    dtype: DType | None = None
    """Type of the weights; None: bfloat16 if the checkpoint has it, else float32."""
    template: str = "vicuna_v1"
    """Conversation template that becomes the folder's chat template."""
    system: object = DEFAULT_SYSTEM
    """System prompt of the chat template, as in `render_conversation`."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest file of weights [bytes]."""
    overwrite: bool = False
    """Replace a folder that exists."""
    quantize: QuantizeOptions | None = None
    """How the decoder is quantised; None: it is not."""


def export_model(settings: RunSettings, output: Path, options: ExportOptions | None = None) -> str:
    """Write a model folder; it appears under its name once it is complete and verified.

    Args:
        settings: the checkpoint.
        output: the folder; must not exist unless `options.overwrite`.
        options: None: the defaults.

    Returns:
        The class that loads the folder.

    Raises:
        UsageError: the folder exists, or the format is unknown.
        ConfigError: another process writes this folder.
        CheckpointError: the checkpoint is damaged or does not fit its settings, or the written weights read back
            differently.
        StorageError: the disk is full or read-only.
    """
    options = options or ExportOptions()
    check_output(output, settings.checkpoint, overwrite=options.overwrite)
    check_fits(options.format, settings.model)
    family, template = find_format(options.format), find_template(options.template)
    rules, added = family.rules(settings.model), adapter_shapes(settings.model)
    tokenizer, quantizer = load_tokenizer(settings.tokenizer), None
    if options.quantize is not None:
        quantizer = Quantizer(options.quantize, settings.model.language, rules, tokenizer)
    # Faults of the checkpoint and the settings show before the long part.
    with single_process(), storage_errors("export not written", output, only=STORAGE_ERRNOS, fix=_FIX):
        dtype = choose_dtype(options.dtype, check_checkpoint(settings.checkpoint, rules, added))
        if quantizer is not None:
            dtype = quantizer.choose_dtype(dtype, is_asked=options.dtype is not None)
        serving = Serving(
            model=settings.model,
            dtype=dtype,
            tokenizer=tokenizer,
            image_aspect=settings.image_aspect,
            template=template,
            system=options.system,
            history=read_history(settings.checkpoint),
            quantization=None if quantizer is None else quantizer.quantization,
        )
        with folder_beside(output, is_new=not options.overwrite, replaces=True) as unfinished:
            family.write_settings(unfinished, serving)
            constants = family.constants(settings.model)
            export: _Export | QuantizedExport
            export = _Export(settings.checkpoint, rules, constants, dtype, settings.model.adapter)
            if quantizer is not None:
                quantizer.write_settings(unfinished)
                export = QuantizedExport(quantizer, export, dtype)
            _write_weights(export, export.writer(unfinished, options.max_shard_bytes))
    return family.ARCHITECTURE


def choose_dtype(asked: DType | None, stored: set[torch.dtype]) -> torch.dtype:
    """Return the type of an export's weights, from the one that is asked for and those in the checkpoint."""
    if asked is not None:
        return DTYPES[asked]
    return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32


def cast_weights(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another type.

    Raises:
        CheckpointError: a value is too large for it.
    """
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(f"{name} holds values that float16 cannot hold", fix="use --dtype bfloat16")
    return cast


def check_checkpoint(checkpoint: Path, rules: Sequence[Rule], added: Mapping[str, tuple[int, ...]]) -> set[torch.dtype]:
    """Compare the files of a checkpoint with its manifest, and its tensors with those of the table and the adapter.

    Args:
        checkpoint: its folder.
        rules: the table.
        added: shapes of the tensors of the adapter, by key.

    Returns:
        The types of the tensors of the table.

    Raises:
        CheckpointError: a file is damaged; a tensor is missing, unknown, or has another shape.
    """
    check_whole(checkpoint)
    tensors = list_tensors(checkpoint)
    found = {key: shape for key, (shape, _) in tensors.items()}
    wanted = {rule.key: _expected_shape(rule, found) for rule in rules} | dict(added)
    differences = describe_differences(wanted, found)
    if differences:
        raise CheckpointError(
            f"checkpoint and its config.yaml differ: {differences}",
            where=str(checkpoint),
            fix="use a complete checkpoint",
        )
    return {tensors[rule.key][1] for rule in rules}


def _expected_shape(rule: Rule, found: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tensor in a checkpoint; versions pad the rows of a vocabulary to different multiples."""
    shape, theirs = rule.checkpoint_shape, found.get(rule.key, ())
    if isinstance(rule.transform, Vocabulary) and theirs[1:] == shape[1:] and theirs[0] >= rule.transform.num_token_ids:
        return theirs
    return shape


@dataclass(frozen=True, slots=True)
class _Export:
    """The tensors of a folder and their origin."""

    checkpoint: Path
    rules: Sequence[Rule]
    constants: Mapping[str, Tensor]
    dtype: torch.dtype
    adapter: AdapterConfig | None
    """To be merged."""

    def announce(self) -> list[Announced]:
        """Describe every tensor, in the order of `tensors`."""
        announced = [
            Announced(name, shape, self.dtype)
            for rule in self.rules
            for layer in rule.layers
            for name, shape in zip(rule.names_of(layer), rule.their_shapes(), strict=True)
        ]
        constants = (
            Announced(name, tuple(tensor.shape), self._type(tensor)) for name, tensor in self.constants.items()
        )
        return [*announced, *constants]

    def writer(self, folder: Path, max_shard_bytes: int) -> WeightsWriter:
        """Return what writes the tensors."""
        return WeightsWriter(folder, self.announce(), max_shard_bytes)

    def read(self, rule: Rule, layer: int | None) -> Iterator[tuple[str, Tensor]]:
        """Return the tensors of a rule as the checkpoint has them, by their names."""
        whole = read_merged(self.checkpoint, self.adapter, rule.key, layer)
        return zip(rule.names_of(layer), rule.transform.split(whole), strict=True)

    def tensors(self, rules: Sequence[Rule] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of some rules or all, and the constants, each made when it is asked for."""
        for rule in self.rules if rules is None else rules:
            for layer in rule.layers:
                yield from ((name, cast_weights(name, tensor, self.dtype)) for name, tensor in self.read(rule, layer))
        yield from ((name, tensor.to(self._type(tensor))) for name, tensor in self.constants.items())

    def _type(self, constant: Tensor) -> torch.dtype:
        """Return that of the weights, except for integers."""
        return self.dtype if constant.is_floating_point() else constant.dtype


def _write_weights(export: _Export | QuantizedExport, writer: Writer) -> None:
    announced = export.announce()
    with tqdm(total=len(announced), unit="tensor", desc="export", disable=None) as progress:
        writer.write(_counted(export.tensors(), progress))
    writer.verify()
    total = sum(entry.num_bytes for entry in announced)
    logger.info("%d tensors, %.3f GB, written and verified", len(announced), total / 1e9)


def _counted(tensors: Iterator[tuple[str, Tensor]], progress: tqdm) -> Iterator[tuple[str, Tensor]]:
    for entry in tensors:
        yield entry
        progress.update()
