"""Make a starting checkpoint from Hugging Face folders: a language model and a tower, or a whole model."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.lazy_tensors import LazyTensor
from megatron_vlm.checkpoint.tensors import write_weights
from megatron_vlm.config import (
    CheckpointError,
    ConfigError,
    LanguageConfig,
    ModelConfig,
    UsageError,
    config_to_dict,
)
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.towers import innermost
from megatron_vlm.convert.differences import describe_differences, different_settings
from megatron_vlm.convert.family import Family, ModelFamily, Part, Parts, family_of
from megatron_vlm.convert.folder import (
    CONFIG_NAME,
    HFFolder,
    common_type,
    foreign_values,
    missing_files,
    read_settings,
)
from megatron_vlm.convert.foreign import check_plain
from megatron_vlm.convert.output import is_model_folder
from megatron_vlm.convert.processing import at_image_size, resize_positions, with_processing
from megatron_vlm.convert.projector import find_projector
from megatron_vlm.convert.rules import Rule, Vocabulary
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer, read_tokenizer_files
from megatron_vlm.platform.files.run_folder import hold_run_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Settings that the folders do not contain."""

    projection: str = "linear"
    """Type of the projection, which starts with random weights; a whole model brings its own."""
    feature_layer: int | None = None
    """Hidden state of the tower that the projection gets; None: the default of our tower."""
    image_size: int | None = None
    """Side of the images [pixels], to which the position embeddings of the tower are interpolated; None: its own."""
    seed: int = 1234
    """Seed of the random projection."""


def import_parts(
    language: Path, vision: Path, run_dir: Path, options: ImportOptions, model: ModelConfig | None = None
) -> ModelConfig:
    """Write checkpoint 0 of a new run from a language model and a tower, e.g. LlamaForCausalLM and CLIPVisionModel.

    Rows of tokens that the language model lacks, image and padding among them, hold the mean of its rows, in embedding
    and output layer. The projection is initialised as in a new model, in the type of the other weights. Memory holds
    one tensor at a time.

    Args:
        language: folder of the language model; its tokenizer is copied into the run.
        vision: folder of the tower.
        run_dir: the new run.
        options: settings that the folders do not contain; ignored if `model` has them.
        model: the model that the folders must hold; None: whatever they hold.

    Returns:
        The settings of the model.

    Raises:
        UsageError: the run already has a checkpoint.
        ConfigError: another job uses the run folder.
        CheckpointError: the folders hold other kinds of models, or differ from `model`.
    """
    check_new(run_dir)
    decoder, tower = _open(language, "language"), _open(vision, "vision")
    chosen = {} if options.feature_layer is None else {"feature_layer": options.feature_layer}
    found = ModelConfig(
        language=_language_config(decoder),
        vision=with_processing(tower.read_config(**chosen), vision),
        projection=make_projector(options.projection),
    )
    model = _agreed(model, at_image_size(found, options.image_size))
    wanted = innermost(model.vision)
    stored = replace(wanted, image_size=found.vision.image_size)  # type: ignore[type-var]
    imported: dict[str, LazyTensor] = {
        **_lazy_tensors(decoder, model.language),
        **resize_positions(_lazy_tensors(tower, stored), stored, wanted),
    }
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in imported.values()))
    _write(run_dir, {**imported, **_draw_projection(model, options.seed, dtype)}, model, language)
    return model


def import_model(
    folder: Path,
    run_dir: Path,
    model: ModelConfig | None = None,
    tower: Path | None = None,
    image_size: int | None = None,
) -> ModelConfig:
    """Write checkpoint 0 of a new run from a whole model, e.g. LlavaForConditionalGeneration; see `import_parts`.

    Args:
        folder: of the model.
        run_dir: the new run.
        model: the model that the folder must hold; None: whatever it holds.
        tower: folder of the tower that the model names, if that is not in its folder.
        image_size: as in `ImportOptions`.
    """
    check_new(run_dir)
    opened, found = _open_model(folder, tower)
    model = _agreed(model, at_image_size(found, image_size))
    stored = model if image_size is None else at_image_size(model, found.vision.image_size)
    tensors = _lazy_tensors(opened, stored)
    tensors = resize_positions(tensors, innermost(stored.vision), innermost(model.vision))
    _write(run_dir, tensors, model, opened.parts.tokenizer)
    return model


def open_model_folder(folder: Path) -> tuple[ModelConfig, dict[str, LazyTensor], Path | None]:
    """Return settings of a whole model, its tensors by our keys, and the file of its tokenizer, if it has one.

    Each tensor is read when it is made.

    Args:
        folder: as transformers saves it.

    Raises:
        CheckpointError: the folder holds another kind of model.
    """
    opened, model = _open_model(folder)
    return model, _lazy_tensors(opened, model), find_tokenizer(opened.parts.tokenizer)


@dataclass(frozen=True, slots=True)
class _OpenFolder:
    """A folder and its family."""

    folder: HFFolder
    family: Family
    parts: Parts

    @property
    def where(self) -> str:
        return str(self.folder.path / CONFIG_NAME)

    def read_config(self, **chosen: Any) -> Any:
        try:
            with foreign_values(self.where):
                return self.family.config_from_hf(self.parts.settings, where=self.where, **chosen)
        except ConfigError as error:  # sizes that do not fit each other
            raise CheckpointError(error.what, where=self.where, fix="use a complete folder") from None


def _open_model(folder: Path, tower: Path | None = None) -> tuple[_OpenFolder, ModelConfig]:
    opened = _open(folder, "model", tower)
    found = opened.read_config(vocab_size=_count_tokens(opened))
    return opened, replace(found, vision=with_processing(found.vision, opened.parts.processor))


def _open(path: Path, part: Part, tower: Path | None = None) -> _OpenFolder:
    where = path / CONFIG_NAME
    settings = read_settings(where)
    with foreign_values(str(where)):
        family = family_of(settings, part, str(where))
        parts = Parts.of_one_folder(path, settings)
        if part == "model":
            parts = cast(ModelFamily, family).find_parts(path, settings, tower)
        for one in (settings, parts.language):
            if method := (one.get("quantization_config") or {}).get("quant_method"):
                fix = "use the model that they were made from"
                raise CheckpointError(f"the weights are quantised ({method})", where=str(where), fix=fix)
    return _OpenFolder(HFFolder(path, family.renames(parts.settings), parts.weights), family, parts)


def _agreed(wanted: ModelConfig | None, found: ModelConfig) -> ModelConfig:
    """Return the model to import: the wanted one, provided that the folders hold it.

    Raises:
        CheckpointError: they differ in a setting that changes what the imported weights compute.
    """
    if wanted is None:
        return found
    differences = {key: values for key, *values in different_settings(wanted, found)}
    if differences:
        resize = ", or name its image size with --image-size" if "model.vision.image_size" in differences else ""
        text = "; ".join(f"{key}={value}, the folder has {other}" for key, (value, other) in differences.items())
        raise CheckpointError(text, fix=f"change the config, or omit --config{resize}")
    return wanted


def check_new(run_dir: Path) -> None:
    """Raise UsageError if the folder has a checkpoint already, or is no run but a model folder."""
    if is_model_folder(run_dir):
        raise UsageError(f"{run_dir} is a model folder, not a run", fix="name another folder with --output")
    if list_iterations(run_dir):
        raise UsageError(f"run {run_dir} already has a checkpoint", fix="name another folder with --output")


def _language_config(opened: _OpenFolder) -> LanguageConfig:
    return opened.read_config(vocab_size=_count_tokens(opened) or _num_rows(opened))


def _num_rows(opened: _OpenFolder) -> int:
    """Return the rows of the vocabulary that config.json names.

    Raises:
        CheckpointError: it names no number of rows.
    """
    rows = opened.parts.language.get("vocab_size", 32000)
    if type(rows) is not int or rows < 1:
        raise CheckpointError(f"vocab_size is {rows!r}, no number of rows", where=opened.where, fix="download it again")
    return rows


def _count_tokens(opened: _OpenFolder) -> int | None:
    """Return the size of the folder's tokenizer; None if it has none."""
    if not find_tokenizer(opened.parts.tokenizer):
        return None
    tokenizer = load_tokenizer(opened.parts.tokenizer)
    _check_new_tokens(tokenizer, _num_rows(opened), opened.where)
    return tokenizer.vocab_size


def _check_new_tokens(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Check that the tokens which have no row in the embedding are control tokens: these are added to a tokenizer."""
    new = range(rows, tokenizer.vocab_size)
    if not all(map(tokenizer.is_control, new)):
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the embedding {rows} rows",
            where=where,
            fix="use the right tokenizer",
        )
    if new:
        logger.info("new tokens, which get the mean of the other rows: %s", ", ".join(map(tokenizer.piece, new)))


def _lazy_tensors(opened: _OpenFolder, config: Any) -> dict[str, LazyTensor]:
    """Return our tensors by key, each to be made from those of the folder when it is written.

    Args:
        opened: the folder.
        config: settings of the part in it.

    Raises:
        CheckpointError: the folder and its table differ.
    """
    rules = [_with_their_rows(rule, _num_rows(opened)) for rule in opened.family.rules(config)]
    _check_tensors(opened.folder, rules, opened.family.unused(config))
    return {rule.key: _lazy_tensor(opened.folder, rule) for rule in rules}


def _with_their_rows(rule: Rule, num_rows: int) -> Rule:
    """Return the rule with this number of rows of the vocabulary."""
    if not isinstance(rule.transform, Vocabulary):
        return rule
    return replace(rule, transform=replace(rule.transform, num_their_rows=num_rows))


def _check_tensors(folder: HFFolder, rules: Sequence[Rule], unused: Sequence[str]) -> None:
    """Compare the folder with the table.

    Raises:
        CheckpointError: they differ; lists every kind of difference.
    """
    wanted = {
        name: shape
        for rule in rules
        for layer in rule.layers
        for name, shape in zip(rule.names_of(layer), rule.their_shapes(), strict=True)
    }
    scales = {rule.scale_of(layer): rule.shape[:1] for rule in rules for layer in rule.layers}
    wanted.update((name, shape) for name, shape in scales.items() if name in folder.stored)
    found = {
        name: stored.shape
        for name, stored in folder.stored.items()
        if name in wanted or not any(re.fullmatch(pattern, name) for pattern in unused)
    }
    check_plain(found.keys() - wanted.keys(), folder.path)
    differences = describe_differences(wanted, found)
    if differences and folder.missing and wanted.keys() - found.keys():
        raise missing_files(folder.missing)
    if differences:
        raise CheckpointError(
            f"weights and config.json differ: {differences}", where=str(folder.path), fix="use a complete folder"
        )


def _lazy_tensor(folder: HFFolder, rule: Rule) -> LazyTensor:
    dtype = common_type(folder.stored[name] for layer in rule.layers for name in rule.names_of(layer))

    def make(layer: int | None) -> Tensor:
        try:
            tensor = rule.transform.join([folder.read(name) for name in rule.names_of(layer)])
        except ValueError as error:
            raise CheckpointError(str(error), where=str(folder.path), fix="use another model") from None
        if (scale := rule.scale_of(layer)) in folder.stored:
            factors = folder.read(scale).float().view(-1, *(1 for _ in rule.shape[1:]))
            tensor = factors * tensor.float()
        return tensor.to(dtype)

    return LazyTensor(shape=rule.checkpoint_shape, dtype=dtype, is_stacked=rule.num_layers is not None, make=make)


def _draw_projection(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the weights of the projection as in a new model."""
    drawn = find_projector(model.projection.type).draw(
        model.projection,
        input_size=model.vision.feature_size,
        output_size=model.language.hidden_size,
        std=model.vision.init_method_std,
        generator=torch.Generator().manual_seed(seed),
    )
    return {key: tensor.to(dtype) for key, tensor in drawn.items()}


def _write(
    run_dir: Path, tensors: Mapping[str, Tensor | LazyTensor], model: ModelConfig, tokenizer_folder: Path
) -> None:
    config: dict[str, Any] = {"model": config_to_dict(model)}
    total = sum(len(tensor.layers) if isinstance(tensor, LazyTensor) else 1 for tensor in tensors.values())
    with (
        hold_run_folder(run_dir, "convert from-hf"),
        tqdm(total=total, unit="tensor", desc="import", disable=None) as progress,
    ):
        check_new(run_dir)
        if find_tokenizer(tokenizer_folder):
            tokenizer = read_tokenizer_files(tokenizer_folder)
            tokenizer.copy_to(run_dir)
            config["data"] = {"tokenizer": str(run_dir / tokenizer.name)}
        else:
            logger.warning("no tokenizer in %s: name it in the training config", tokenizer_folder)
        write_weights(run_dir, tensors, config, progress.update)
