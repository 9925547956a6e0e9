"""Export a checkpoint of any parallel layout as a folder that transformers loads, tensor by tensor."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.checkpoint.verify import inspect_checkpoint
from megatron_vlm.config import CheckpointError, ModelConfig, UsageError
from megatron_vlm.convert.differences import describe_differences
from megatron_vlm.convert.families import clip, llava
from megatron_vlm.convert.files.processor import chat_template, generation_config, write_processor
from megatron_vlm.convert.files.tokenizer import write_tokenizer
from megatron_vlm.convert.folder import CONFIG_NAME, write_json
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.weights_writer import Announced, WeightsWriter
from megatron_vlm.data.text.templates import DEFAULT_SYSTEM, find_template
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.parallel.groups import single_process
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, folder_beside, storage_errors

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
_FIX = "make room or name another folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How the folder is written."""

    dtype: DType | None = None
    """Of the weights; None: bfloat16 where the checkpoint has it, else float32."""
    template: str = "vicuna_v1"
    """Conversation template that becomes the folder's chat template."""
    system: object = DEFAULT_SYSTEM
    """System prompt of the chat template, as in `render_conversation`."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest file of weights [bytes]."""
    overwrite: bool = False
    """Replace a folder that exists."""


def export_llava(settings: RunSettings, output: Path, options: ExportOptions | None = None) -> None:
    """Write a LlavaForConditionalGeneration folder; it appears under its name when it is whole and read back.

    Args:
        settings: the checkpoint.
        output: the folder; must not exist unless `options.overwrite`.
        options: None: the defaults.

    Raises:
        UsageError: the folder exists.
        CheckpointError: the checkpoint is damaged or of another model, or what was written reads back otherwise.
        StorageError: the disk is full or read-only.
    """
    options = options or ExportOptions()
    if output.exists() and not options.overwrite:
        raise UsageError(f"folder {output} exists", fix="name another one, or add --overwrite")
    find_template(options.template)
    rules = llava.rules(settings.model)
    # What is wrong with the checkpoint or the settings shows before the long part.
    with single_process(), storage_errors("export not written", output, only=STORAGE_ERRNOS, fix=_FIX):
        dtype = _choose_dtype(options.dtype, check_checkpoint(settings.checkpoint, rules))
        with folder_beside(output, is_new=not options.overwrite, replaces=True) as unfinished:
            _write_settings(settings, options, unfinished, dtype)
            _write_weights(settings, rules, unfinished, dtype, options.max_shard_bytes)


def _choose_dtype(asked: DType | None, stored: set[torch.dtype]) -> torch.dtype:
    if asked is not None:
        return DTYPES[asked]
    return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32


def check_checkpoint(checkpoint: Path, rules: Sequence[Rule]) -> set[torch.dtype]:
    """Compare the files of a checkpoint with its manifest, and its tensors with those of the table.

    Returns:
        The types that its tensors have.

    Raises:
        CheckpointError: a file is damaged; a tensor is missing, beyond the table, or has another shape.
    """
    faults = inspect_checkpoint(checkpoint, read_files=True).faults
    if faults:
        raise CheckpointError(f"checkpoint is damaged: {faults[0]}", where=str(checkpoint), fix="use another one")
    tensors = list_tensors(checkpoint)
    found = {key: shape for key, (shape, _) in tensors.items()}
    wanted = {rule.key: rule.checkpoint_shape for rule in rules}
    differences = describe_differences(wanted, found)
    if differences:
        raise CheckpointError(
            f"checkpoint and its config.yaml differ: {differences}", where=str(checkpoint), fix="use a complete one"
        )
    return {dtype for _, dtype in tensors.values()}


def _write_weights(
    settings: RunSettings, rules: Sequence[Rule], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    announced = [
        Announced(name, shape, dtype)
        for rule in rules
        for layer in rule.layers
        for name, shape in zip(rule.names_of(layer), rule.their_shapes(), strict=True)
    ]
    announced += [Announced(name, tuple(tensor.shape), dtype) for name, tensor in _post_norm(settings.model, dtype)]
    writer = WeightsWriter(folder, announced, max_shard_bytes)
    with tqdm(total=len(announced), unit="tensor", desc="export", disable=None) as progress:
        writer.write(_counted(_tensors(settings, rules, dtype), progress))
    writer.verify()
    total = sum(entry.num_bytes for entry in announced)
    logger.info("%d tensors, %.3f GB, written and read back equal", len(announced), total / 1e9)


def _counted(tensors: Iterator[tuple[str, Tensor]], progress: tqdm) -> Iterator[tuple[str, Tensor]]:
    for entry in tensors:
        yield entry
        progress.update()


def _tensors(settings: RunSettings, rules: Sequence[Rule], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        for layer in rule.layers:
            whole = read_tensor(settings.checkpoint, rule.key, layer)
            for name, part in zip(rule.names_of(layer), rule.transform.split(whole), strict=True):
                yield name, part.to(dtype)
    yield from _post_norm(settings.model, dtype)


def _post_norm(model: ModelConfig, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Return the norm of the class token's last feature, which LLaVA has and never uses: one that changes nothing."""
    hidden = model.vision.feature_size
    return [
        (llava.POST_NORM + "weight", torch.ones(hidden, dtype=dtype)),
        (llava.POST_NORM + "bias", torch.zeros(hidden, dtype=dtype)),
    ]


def _write_settings(settings: RunSettings, options: ExportOptions, folder: Path, dtype: torch.dtype) -> None:
    model = settings.model
    tokenizer = load_tokenizer(settings.tokenizer)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    added = write_tokenizer(folder, settings.tokenizer, tokenizer, model.language)
    write_processor(folder, clip.tower_of(model), settings.image_aspect, added.image)
    write_json(folder / CONFIG_NAME, llava.config_to_hf(model, dtype=str(dtype).removeprefix("torch."), **ids))
    write_json(folder / "generation_config.json", generation_config(model.language, **ids))
    template = find_template(options.template)
    if template.question_text:
        bos, eos = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
        text = chat_template(template, options.system, bos=bos, eos=eos, image=added.image)
        (folder / "chat_template.jinja").write_text(text)
