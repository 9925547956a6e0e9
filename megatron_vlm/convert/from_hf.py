"""Make a starting checkpoint of Hugging Face folders: a Llama and a CLIP tower, or a whole LLaVA."""

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.checkpoint.lazy_tensors import LazyTensor
from megatron_vlm.checkpoint.tensors import write_weights
from megatron_vlm.config import (
    CheckpointError,
    LanguageConfig,
    ModelConfig,
    UsageError,
    config_to_dict,
)
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.convert.differences import describe_differences
from megatron_vlm.convert.families import clip, llama, llava
from megatron_vlm.convert.folder import CONFIG_NAME, HFFolder, read_json
from megatron_vlm.convert.rules import Rule
from megatron_vlm.data.text.tokenizer import MODEL_FILE, load_tokenizer

logger = logging.getLogger(__name__)

_PROCESSOR_NAME = "preprocessor_config.json"
# Fields that a training may choose freely: they change no tensor and not what the imported weights compute.
_FREE_LANGUAGE = {"init_method_std", "max_position_embeddings"}
_FREE_VISION = {"init_method_std", "feature_layer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the folders do not say."""

    projection: Literal["linear", "mlp2x_gelu"] = "linear"
    """Kind of the projection, which starts random; a LLaVA brings its own."""
    feature_layer: int = -2
    """Hidden state of the tower that is handed on; a LLaVA says it."""
    seed: int = 1234
    """Of the random projection."""


def import_parts(
    language: Path, vision: Path, run_dir: Path, options: ImportOptions, model: ModelConfig | None = None
) -> ModelConfig:
    """Write checkpoint 0 of a new run from a LlamaForCausalLM and a CLIPVisionModel or CLIPModel.

    Rows of the vocabulary beyond the Llama's own (image, padding, rounding up) hold the mean of its rows; their
    embeddings are not used, and their logits are those of an average piece. The projection is drawn as a new
    model's.

    Args:
        language: folder of the Llama; its tokenizer.model is copied into the run.
        vision: folder of the tower.
        run_dir: the new run.
        options: what the folders do not say; ignored where `model` says it.
        model: sizes that the folders must have; None: those that they have.

    Returns:
        The sizes of the model.

    Raises:
        UsageError: the run has a checkpoint already.
        CheckpointError: the folders do not hold such models, or other sizes than `model`.
    """
    _check_new(run_dir)
    llama_folder, clip_folder = HFFolder(language, llama.RENAMES), HFFolder(vision, clip.RENAMES)
    found = ModelConfig(
        language=_language_config(llama_folder),
        vision=_vision_config(clip_folder, options.feature_layer),
        projection=make_projector(options.projection),
    )
    if model is not None:
        _check_same(model, found)
    model = model or found
    vocab_rows = llama_folder.config["vocab_size"]
    language_source = _Source(
        llama_folder, llama.rules(model.language, vocab_rows=vocab_rows), llama.unused(model.language)
    )
    vision_source = _Source(clip_folder, clip.rules(clip.tower_of(model)), clip.unused(clip.tower_of(model)))
    tensors: dict[str, Tensor | LazyTensor] = {
        **_lazy_tensors([language_source, vision_source], model.language),
        **_draw_projection(model, options.seed),
    }
    _write(run_dir, tensors, model, language)
    return model


def import_llava(folder: Path, run_dir: Path, model: ModelConfig | None = None) -> ModelConfig:
    """Write checkpoint 0 of a new run from a LlavaForConditionalGeneration; see `import_parts`."""
    _check_new(run_dir)
    source = HFFolder(folder, llava.RENAMES)
    _check_kind(source, "llava")
    found = llava.config_from_hf(source.config, where=str(source.path / CONFIG_NAME))
    found = replace(found, vision=_with_colours(clip.tower_of(found), source.path))
    if model is not None:
        _check_same(model, found)
    model = model or found
    tensors = _lazy_tensors([_Source(source, llava.rules(model), llava.unused(model))], model.language)
    _write(run_dir, tensors, model, folder)
    return model


def _check_new(run_dir: Path) -> None:
    if list_iterations(run_dir):
        raise UsageError(f"run {run_dir} has a checkpoint already", fix="name another folder with --output")


def _check_kind(folder: HFFolder, *kinds: str) -> None:
    kind = folder.config.get("model_type")
    if kind not in kinds:
        raise CheckpointError(
            f"model_type is {kind}, not {' or '.join(kinds)}",
            where=str(folder.path / CONFIG_NAME),
            fix="check the path",
        )


def _language_config(folder: HFFolder) -> LanguageConfig:
    _check_kind(folder, "llama")
    where = str(folder.path / CONFIG_NAME)
    rows = vocab_size = folder.config["vocab_size"]
    if (folder.path / MODEL_FILE).is_file():
        vocab_size = load_tokenizer(folder.path).vocab_size
    if vocab_size > rows:
        raise CheckpointError(
            f"tokenizer has {vocab_size} pieces, the embedding {rows} rows", where=where, fix="use the right tokenizer"
        )
    return llama.config_from_hf(folder.config, vocab_size=vocab_size, where=where)


def _vision_config(folder: HFFolder, feature_layer: int) -> ClipConfig:
    _check_kind(folder, "clip_vision_model", "clip")
    vision = clip.config_from_hf(folder.config, feature_layer=feature_layer, where=str(folder.path / CONFIG_NAME))
    return _with_colours(vision, folder.path)


def _with_colours(vision: ClipConfig, folder: Path) -> ClipConfig:
    """Take mean and spread of the colours from the folder, where it has them."""
    path = folder / _PROCESSOR_NAME
    if not path.is_file():
        return vision
    settings = read_json(path)
    mean, std = settings.get("image_mean", vision.image_mean), settings.get("image_std", vision.image_std)
    return replace(vision, image_mean=tuple(mean), image_std=tuple(std))


def _check_same(wanted: ModelConfig, found: ModelConfig) -> None:
    """Compare all that decides what the imported weights compute."""
    parts = (
        ("model.language", wanted.language, found.language, _FREE_LANGUAGE),
        ("model.vision", clip.tower_of(wanted), clip.tower_of(found), _FREE_VISION),
    )
    differences = []
    for section, ours, theirs, free in parts:
        for field in fields(ours):
            value, other = _effective(ours, field.name), _effective(theirs, field.name)
            if field.name not in free and value != other:
                differences.append(f"{section}.{field.name}={value}, the folder has {other}")
    if differences:
        raise CheckpointError("; ".join(differences), fix="change the config, or leave --config out")


def _effective(part: Any, name: str) -> Any:
    derived = {"num_query_groups": "query_groups", "kv_channels": "head_channels"}
    return getattr(part, derived.get(name, name))


@dataclass(frozen=True, slots=True)
class _Source:
    """A folder, the tensors to take from it, and those that it may hold beside them."""

    folder: HFFolder
    rules: Sequence[Rule]
    unused: Sequence[str]

    def check(self) -> None:
        """Compare the folder with the table.

        Raises:
            CheckpointError: names every kind of difference.
        """
        wanted = {
            name: shape
            for rule in self.rules
            for layer in rule.layers
            for name, shape in zip(rule.names_of(layer), rule.their_shapes(), strict=True)
        }
        found = {
            name: stored.shape
            for name, stored in self.folder.stored.items()
            if name in wanted or not any(re.fullmatch(pattern, name) for pattern in self.unused)
        }
        differences = describe_differences(wanted, found)
        if differences:
            raise CheckpointError(
                f"weights and config.json differ: {differences}", where=str(self.folder.path), fix="use a whole folder"
            )


def _lazy_tensors(sources: Sequence[_Source], language: LanguageConfig) -> dict[str, LazyTensor]:
    """Return our tensors by key, each made of the folders' when it is asked for.

    Raises:
        CheckpointError: a folder and its table differ.
    """
    for source in sources:
        source.check()
    return {rule.key: _lazy_tensor(source.folder, rule, language) for source in sources for rule in source.rules}


def _lazy_tensor(folder: HFFolder, rule: Rule, language: LanguageConfig) -> LazyTensor:
    is_vocabulary = rule.key in (llama.EMBEDDING_KEY, llama.OUTPUT_KEY)
    shape = (language.padded_vocab_size, *rule.shape[1:]) if is_vocabulary else rule.checkpoint_shape
    dtype = _common_type(folder, rule)

    def make(layer: int | None) -> Tensor:
        try:
            tensor = rule.transform.join([folder.read(name) for name in rule.names_of(layer)]).to(dtype)
        except ValueError as error:
            raise CheckpointError(str(error), where=str(folder.path), fix="use another model") from None
        return pad_vocabulary(tensor, language) if is_vocabulary else tensor

    return LazyTensor(shape=shape, dtype=dtype, is_stacked=rule.num_layers is not None, make=make)


def _common_type(folder: HFFolder, rule: Rule) -> torch.dtype:
    """Return the type that holds the values of all layers; a folder may mix types."""
    types = {folder.stored[name].dtype for layer in rule.layers for name in rule.names_of(layer)}
    return reduce(torch.promote_types, types)


def pad_vocabulary(rows: Tensor, language: LanguageConfig) -> Tensor:
    """Return the embedding with `padded_vocab_size` rows; rows that no piece has hold the mean of the others.

    Args:
        rows: float[n, h]; n at least the pieces of the tokenizer. A tensor of the full size is returned as it is.
        language: sizes of the vocabulary.
    """
    if rows.size(0) == language.padded_vocab_size:
        return rows
    pieces = rows[: language.vocab_size]
    mean = pieces.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([pieces, mean.expand(language.padded_vocab_size - language.vocab_size, -1)])


def _draw_projection(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Draw the projection as a new model does: normal weights, no bias."""
    generator = torch.Generator().manual_seed(seed)
    hidden, features, std = model.language.hidden_size, model.vision.feature_size, model.vision.init_method_std
    if model.projection.type == "linear":
        layers = {"": (features, std)}
    else:
        # megatron-core draws the layer before a residual sum with std / sqrt(2 * layers); the projection counts as one.
        layers = {"linear_fc1.": (features, std), "linear_fc2.": (hidden, std / 2**0.5)}
    drawn = {}
    for name, (width, scale) in layers.items():
        drawn[f"{llava.KEY_PREFIX}{name}weight"] = torch.randn(hidden, width, generator=generator) * scale
        drawn[f"{llava.KEY_PREFIX}{name}bias"] = torch.zeros(hidden)
    return drawn


def _write(
    run_dir: Path, tensors: Mapping[str, Tensor | LazyTensor], model: ModelConfig, tokenizer_folder: Path
) -> None:
    config: dict[str, Any] = {"model": config_to_dict(model)}
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_folder / MODEL_FILE
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, run_dir / MODEL_FILE)
        config["data"] = {"tokenizer": str(run_dir / MODEL_FILE)}
    else:
        logger.warning("no %s in %s: name the tokenizer in the training config", MODEL_FILE, tokenizer_folder)
    total = sum(len(tensor.layers) if isinstance(tensor, LazyTensor) else 1 for tensor in tensors.values())
    with tqdm(total=total, unit="tensor", desc="import", disable=None) as progress:
        write_weights(run_dir, tensors, config, progress.update)
