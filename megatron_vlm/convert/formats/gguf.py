"""Two files for llama.cpp and what is built on it, such as Ollama: the language model, and tower with projection.

llama.cpp's graph of a LLaVA takes SigLIP, and two linear layers with a GELU between them. A linear projection goes
into these as x and -x side by side: gelu(x) - gelu(-x) is x.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tools/mtmd/clip.cpp and tools/mtmd/models/llava.cpp
of llama.cpp.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.config import CheckpointError, LanguageConfig, ModelConfig
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.towers import TowerConfig, siglip
from megatron_vlm.convert.adapter import adapter_shapes, read_merged
from megatron_vlm.convert.family import NO_FORMAT, Described, decoder_family, find_tower_family, formats_that_hold
from megatron_vlm.convert.files.model_card import CardFormat, write_card
from megatron_vlm.convert.files.processor import chat_template
from megatron_vlm.convert.files.tokenizer import KINDS, placeholder_names
from megatron_vlm.convert.gguf_file import require_gguf, tensor_names, write_gguf
from megatron_vlm.convert.history import read_history
from megatron_vlm.convert.output import check_output
from megatron_vlm.convert.projector import find_projector
from megatron_vlm.convert.rules import LinearAsPair, Rule
from megatron_vlm.convert.to_hf import ExportOptions, cast_weights, check_checkpoint, choose_dtype
from megatron_vlm.convert.weights_writer import Announced
from megatron_vlm.data.text.templates import find_template, stop_ids
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.parallel.groups import single_process
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, folder_beside, storage_errors

logger = logging.getLogger(__name__)

TEXT_NAME, VISION_NAME = "model.gguf", "mmproj.gguf"
_CLIP = (
    "llama.cpp puts the class token of a CLIP tower behind the patches, where its positions are wrong "
    "(ggml-org/llama.cpp#25814)"
)
_CARD = CardFormat(
    title="A vision-language model for llama.cpp",
    usage="""
`llama-server --model model.gguf --mmproj mmproj.gguf`, then OpenAI's chat endpoint. Programs built on llama.cpp, like
Ollama, take the two files as well. Images are padded to squares.
""",
    can_verify=False,
)
_PROJECTOR_NAMES = {"linear_1": "mm.0", "linear_2": "mm.2"}
_POSITIONS, _PATCHES = "v.position_embd.weight", "v.patch_embd.weight"


def export(settings: RunSettings, output: Path, options: ExportOptions) -> str:
    """Write model.gguf and mmproj.gguf.

    Args:
        settings: the checkpoint.
        output: the folder; must not exist unless `options.overwrite`.
        options: None for `dtype` keeps that of the checkpoint.

    Returns:
        What loads the folder, for people.

    Raises:
        UsageError: the folder exists, or the package gguf is missing.
        CheckpointError: the checkpoint is damaged, or llama.cpp cannot compute with the tower, the projection or the
            tokenizer.
        StorageError: the disk is full or read-only.
    """
    check_output(output, settings.checkpoint, overwrite=options.overwrite)
    check_model(settings.model)
    require_gguf()
    fix, model = "make room or name another folder", settings.model
    tables = {TEXT_NAME: _text_table(model.language), VISION_NAME: _vision_table(model)}
    with single_process(), storage_errors("export not written", output, only=STORAGE_ERRNOS, fix=fix):
        rules = [rule for table in tables.values() for rule in table.rules]
        dtype = choose_dtype(options.dtype, check_checkpoint(settings.checkpoint, rules, adapter_shapes(model)))
        keys = {TEXT_NAME: _text_settings(settings, options), VISION_NAME: _vision_settings(model)}
        if settings.image_aspect != "pad":
            logger.warning(
                "training made images square with image_aspect=%s, llama.cpp pads them: give it square images",
                settings.image_aspect,
            )
        history = read_history(settings.checkpoint)
        described = Described(model=model, dtype=dtype, image_aspect=settings.image_aspect, history=history)
        with folder_beside(output, is_new=not options.overwrite, replaces=True) as unfinished:
            for name, table in tables.items():
                file = _File(settings, table, dtype)
                write_gguf(unfinished / name, keys[name], list(file.announce()), file.tensors(), dtype=dtype)
            write_card(unfinished, described, _CARD)
    return f"llama-server --model {output / TEXT_NAME} --mmproj {output / VISION_NAME}"


def check_model(model: ModelConfig) -> None:
    """Check that llama.cpp computes what the model does.

    Raises:
        CheckpointError: it does not; names the formats that hold the model.
    """
    reason, where = _reason_against(model.vision), "model.vision"
    if reason is None and _projector_rules(model) is None:
        reason, where = f"llama.cpp has no projection of type {model.projection.type}", "model.projection"
    if reason is not None:
        others = formats_that_hold(model)
        fix = f"use --format {' or '.join(others)}" if others else NO_FORMAT
        raise CheckpointError(f"the format gguf cannot hold the model: {reason}", where=where, fix=fix)


def _reason_against(vision: TowerConfig) -> str | None:
    if vision.type == "clip":
        return _CLIP
    if vision.type != "siglip":
        return f"llama.cpp's LLaVA has no tower of type {vision.type}, only siglip"
    assert isinstance(vision, siglip.Config)
    if vision.hidden_size == vision.ffn_hidden_size:
        return "llama.cpp tells the two matrices of a tower's MLP apart by their shape, and these have the same"
    return None


@dataclass(frozen=True, slots=True)
class _Table:
    """The tensors of a file."""

    rules: Sequence[Rule]
    rename: Callable[[str], str]
    """From the names in the rules to llama.cpp's."""
    heads: dict[str, int]
    """Heads of the tensors whose rows are in another order there, by the part of their name after the layer's."""


def _text_table(language: LanguageConfig) -> _Table:
    rules = decoder_family().rules(language)
    heads = {"attn_q.weight": language.num_attention_heads, "attn_k.weight": language.query_groups}
    return _Table(rules, tensor_names("LLAMA", language.num_layers), heads)


def _vision_table(model: ModelConfig) -> _Table:
    projector = _projector_rules(model)
    assert projector is not None
    assert isinstance(model.vision, siglip.Config)
    tower = find_tower_family(model.vision.type).rules(model.vision)
    translate = tensor_names("MMPROJ", model.vision.num_layers_run)

    def rename(name: str) -> str:
        module, _, kind = name.partition(".")
        return f"{_PROJECTOR_NAMES[module]}.{kind}" if module in _PROJECTOR_NAMES else translate(f"vision_tower.{name}")

    return _Table([*tower, *projector], rename, {})


def _projector_rules(model: ModelConfig) -> list[Rule] | None:
    """Return the table of the projection; None if it is no pair of linear layers with a GELU between them."""
    width = model.vision.feature_size
    sizes = {"input_size": width, "output_size": model.language.hidden_size}
    projector = find_projector(model.projection.type).llava(model.projection, **sizes)
    if projector is None:
        return None
    if projector.activation == "gelu":
        return projector.rules
    # A linear one, whatever stands between the layers elsewhere; here the first of the two may have any width.
    return [
        replace(rule, transform=LinearAsPair(width, 2 * width, of_bias=rule.key.endswith(".bias")))
        for rule in projector.rules
    ]


@dataclass(frozen=True, slots=True)
class _File:
    """The tensors of a file and their origin."""

    settings: RunSettings
    table: _Table
    dtype: torch.dtype

    def announce(self) -> Iterator[Announced]:
        """Describe every tensor, in the order of `tensors`."""
        for rule in self.table.rules:
            for layer in rule.layers:
                for name, shape in zip(self._names(rule, layer), rule.their_shapes(), strict=True):
                    yield Announced(name, shape, self._dtype_of(name, shape))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, made when it is asked for."""
        for rule in self.table.rules:
            for layer in rule.layers:
                whole = read_merged(self.settings.checkpoint, self.settings.model.adapter, rule.key, layer)
                for name, tensor in zip(self._names(rule, layer), rule.transform.split(whole), strict=True):
                    heads = self.table.heads.get(name.split(".", 2)[-1])
                    ordered = tensor if heads is None else _interleave(tensor, heads)
                    yield name, cast_weights(name, ordered, self._dtype_of(name, tuple(tensor.shape)))

    def _names(self, rule: Rule, layer: int | None) -> list[str]:
        return [self.table.rename(name) for name in rule.names_of(layer)]

    def _dtype_of(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """Return the type that llama.cpp's kernels take: not all of them know float16 or bfloat16."""
        is_convolution_in_bfloat16 = name == _PATCHES and self.dtype == torch.bfloat16
        if len(shape) == 1 or name == _POSITIONS or is_convolution_in_bfloat16:
            return torch.float32
        return self.dtype


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Put the two channels that RoPE rotates together side by side; transformers has them half a head apart."""
    return weight.reshape(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def _text_settings(settings: RunSettings, options: ExportOptions) -> dict[str, Any]:
    language, tokenizer = settings.model.language, load_tokenizer(settings.tokenizer)
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.vocab_size": language.num_token_ids,
        "llama.context_length": language.max_position_embeddings,
        "llama.embedding_length": language.hidden_size,
        "llama.block_count": language.num_layers,
        "llama.feed_forward_length": language.ffn_hidden_size,
        "llama.rope.dimension_count": language.head_channels,
        "llama.rope.freq_base": float(language.rotary_base),
        "llama.attention.head_count": language.num_attention_heads,
        "llama.attention.head_count_kv": language.query_groups,
        "llama.attention.key_length": language.head_channels,
        "llama.attention.value_length": language.head_channels,
        "llama.attention.layer_norm_rms_epsilon": float(language.layernorm_epsilon),
        **{f"tokenizer.{key}": value for key, value in _tokenizer_settings(tokenizer, language, options).items()},
    }


def _tokenizer_settings(tokenizer: Tokenizer, language: LanguageConfig, options: ExportOptions) -> dict[str, Any]:
    if tokenizer.vocab_size != language.vocab_size:
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model {language.vocab_size}",
            where=str(tokenizer.files.path),
            fix="name the tokenizer of the training with --tokenizer",
        )
    image, pad = placeholder_names(tokenizer)
    kind = find_module(KINDS, tokenizer.kind, "kind of tokenizer")
    vocabulary = kind.ggml_vocabulary(tokenizer, {language.image_token_id: image, language.pad_token_id: pad})
    template = find_template(options.template)
    ends = sorted(stop_ids(template, tokenizer) - {tokenizer.eos_id})
    bos, eos = tokenizer.bos, tokenizer.piece(tokenizer.eos_id)
    # No name of the placeholder: llama.cpp puts one of its own there.
    text = chat_template(template, options.system, start=bos, bos=bos, eos=eos, image=None)
    return {
        **{f"ggml.{key}": value for key, value in vocabulary.items()},
        **({"ggml.bos_token_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}),
        "ggml.eos_token_id": tokenizer.eos_id,
        **({"ggml.eot_token_id": ends[0]} if ends else {}),
        "ggml.padding_token_id": language.pad_token_id,
        "ggml.add_bos_token": tokenizer.bos_id is not None,
        "ggml.add_eos_token": False,
        **({"chat_template": text} if template.question_text else {}),
    }


def _vision_settings(model: ModelConfig) -> dict[str, Any]:
    vision = model.vision
    assert isinstance(vision, siglip.Config)
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.ffn_hidden_size,
        "clip.vision.projection_dim": model.language.hidden_size,
        "clip.vision.block_count": vision.num_layers_run,
        "clip.vision.feature_layer": [vision.num_layers_run],
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layernorm_epsilon),
        "clip.vision.image_mean": [float(value) for value in vision.image_mean],
        "clip.vision.image_std": [float(value) for value in vision.image_std],
    }
