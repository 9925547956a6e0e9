"""Make a starting checkpoint from a PEFT folder with LoRA and the run that it adapts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.checkpoint.run_settings import RunSettings, read_run_settings
from megatron_vlm.checkpoint.tensors import write_weights
from megatron_vlm.checkpoint.verify import check_whole
from megatron_vlm.config import CheckpointError, ModelConfig, config_to_dict
from megatron_vlm.config.adapters import lora
from megatron_vlm.convert.adapters.lora import pair_keys, weight_key
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.folder import common_type, list_tensors, read_json, read_stored
from megatron_vlm.convert.from_hf import check_new
from megatron_vlm.convert.peft_names import (
    LORA_A,
    LORA_B,
    OTHER_NAMES,
    PROJECTOR,
    SETTINGS_NAME,
    WEIGHTS_NAME,
    from_peft,
    last_module,
)
from megatron_vlm.convert.rules import Rule
from megatron_vlm.platform.files.run_folder import hold_run_folder


def import_adapter(folder: Path, base: Path, run_dir: Path) -> ModelConfig:
    """Write checkpoint 0 of a new run, which holds the adapter and names the base.

    PEFT has an A of its own for each of query, key and value, and for gate and up projection. They are stacked into one
    A of the fused matrix, whose B has their rows of B, each with zeros for the ranks of the others: the product is the
    same, and the rank the sum of theirs.

    Args:
        folder: adapter_config.json and adapter_model.safetensors, or pickled files; names as in transformers' Llava, in
            a LlamaForCausalLM, or in the code of LLaVA and VILA.
        base: the run or checkpoint that holds the weights of the adapted model.
        run_dir: the new run.

    Returns:
        The settings of the model with its adapter.

    Raises:
        UsageError: the run already has a checkpoint.
        ConfigError: another job uses the run folder.
        CheckpointError: the folder is incomplete, adapts something that LoRA here does not, or does not fit the base.
    """
    check_new(run_dir)
    settings = read_run_settings(base)
    if settings.model.adapter is not None:
        raise CheckpointError(
            f"the base has an adapter of type {settings.model.adapter.type} already",
            where=str(settings.checkpoint),
            fix="name the run that it adapts, or export and import the merged model",
        )
    check_whole(settings.checkpoint)
    peft = _PeftFolder.open(folder, settings.model)
    targets = {target: peft.join(weight_key(target)) for target in lora.TARGETS}
    joined = {target: pair for target, pair in targets.items() if pair is not None}
    if not joined:
        raise CheckpointError("no matrix of the decoder is adapted", where=str(folder), fix="use a folder with LoRA")
    adapter = lora.Config(
        rank=peft.rank,
        alpha=peft.scale * peft.rank,
        dropout=float(peft.settings.get("lora_dropout", 0.0)),
        targets=tuple(joined),
        ranks={target: pair.rank for target, pair in joined.items() if pair.rank != peft.rank},
    )
    model = replace(settings.model, adapter=adapter)
    tensors = {
        key: tensor
        for target, pair in joined.items()
        for key, tensor in zip(pair_keys(target), (pair.a, pair.b), strict=True)
    }
    _write(run_dir, tensors | peft.projection(), model, settings)
    return model


def _write(run_dir: Path, tensors: Mapping[str, Tensor], model: ModelConfig, settings: RunSettings) -> None:
    data = {"tokenizer": str(settings.tokenizer), "image_aspect": settings.image_aspect}
    with hold_run_folder(run_dir, "convert from-hf --peft"):
        check_new(run_dir)
        config = {"model": config_to_dict(model), "data": data}
        write_weights(run_dir, tensors, config, base=settings.checkpoint)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of a fused matrix, stacked over the layers."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.size(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeftFolder:
    """The settings and tensors of a PEFT folder."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By PEFT's names."""
    names: Mapping[tuple[str, str], str]
    """PEFT's names, by kind (LORA_A, LORA_B, or nothing for a whole module) and name in the table."""
    rules: tuple[Rule, ...]

    @classmethod
    def open(cls, path: Path, model: ModelConfig) -> "_PeftFolder":
        settings = read_json(path / SETTINGS_NAME)
        if settings.get("peft_type") != "LORA":
            raise CheckpointError(
                f"peft_type is {settings.get('peft_type')}, not LORA",
                where=str(path / SETTINGS_NAME),
                fix="use a folder with LoRA",
            )
        rules = tuple(llava.rules(model))
        # Of files with the same tensors the last counts: PEFT, too, prefers safetensors.
        files = [path / name for name in (*OTHER_NAMES[::-1], WEIGHTS_NAME) if (path / name).is_file()]
        stored = {entry.name: entry for file in files or [path / WEIGHTS_NAME] for entry in list_tensors(file)}
        names = {_kind_and_name(name): name for name in stored}
        _check_known(names, rules, path)
        common_type(stored.values())
        tensors = {name: read_stored(stored[name]) for name in names.values()}
        return cls(path=path, settings=settings, tensors=tensors, names=names, rules=rules)

    @property
    def rank(self) -> int:
        return int(self.settings["r"])

    @property
    def scale(self) -> float:
        return self._scale_of(float(self.settings["lora_alpha"]), self.rank)

    def _scale_of(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def join(self, key: str) -> _Pair | None:
        """Return the pair of a fused matrix; None if no part of it is adapted."""
        (rule,) = (rule for rule in self.rules if rule.key == key)
        layers = [[self._pair_of(name) for name in rule.names_of(layer)] for layer in rule.layers]
        ranks = {tuple(None if pair is None else pair[0].size(0) for pair in parts) for parts in layers}
        if len(ranks) > 1:
            raise CheckpointError(
                f"the layers adapt {', '.join(map(last_module, rule.names))} with different ranks, or not all of them",
                where=str(self.path),
                fix="use an adapter that is the same in all layers",
            )
        if not any(ranks.copy().pop()):
            return None
        joined = [_stack(rule, parts) for parts in layers]
        return _Pair(torch.stack([a for a, _ in joined]), torch.stack([b for _, b in joined]))

    def _pair_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return A and B of a matrix of the folder, B in units of the folder's common scale."""
        names = [self.names.get((kind, name)) for kind in (LORA_A, LORA_B)]
        if names == [None, None]:
            return None
        missing = next((kind for kind, found in zip((LORA_A, LORA_B), names, strict=True) if found is None), None)
        if missing is not None:
            raise CheckpointError(
                f"{name} has no{missing.removesuffix('.weight').replace('.', ' ')}",
                where=str(self.path),
                fix="use a complete folder",
            )
        a, b = (self.tensors[str(found)] for found in names)
        pattern = self.settings.get("alpha_pattern") or {}
        module = str(names[0]).removesuffix(LORA_A)
        alpha = next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        factor = self._scale_of(float(self.settings["lora_alpha"] if alpha is None else alpha), a.size(0)) / self.scale
        return a, b if factor == 1 else b * factor

    def projection(self) -> dict[str, Tensor]:
        """Return our tensors of the projection, if the folder has it."""
        found = {}
        for rule in self.rules:
            names = [self.names.get(("", name)) for name in rule.names]
            if rule.names[0].startswith(PROJECTOR) and any(names):
                if None in names:
                    raise CheckpointError(
                        "the projection is incomplete", where=str(self.path), fix="use a complete folder"
                    )
                theirs = [self.tensors[str(name)] for name in names]
                shapes = [tuple(tensor.shape) for tensor in theirs]
                if shapes != rule.their_shapes():
                    raise CheckpointError(
                        f"the projection has the shapes {shapes}, the base {rule.their_shapes()}",
                        where=str(self.path),
                        fix="name the base that was adapted",
                    )
                found[rule.key] = rule.transform.join(theirs)
        return found


def _kind_and_name(name: str) -> tuple[str, str]:
    kind = next((kind for kind in (LORA_A, LORA_B) if name.endswith(kind)), "")
    return kind, from_peft(name)


def _check_known(names: Mapping[tuple[str, str], str], rules: tuple[Rule, ...], folder: Path) -> None:
    """Raise CheckpointError if a tensor adapts or replaces something else than the decoder and the projection."""
    keys = {weight_key(target) for target in lora.TARGETS}
    adapted = {name for rule in rules if rule.key in keys for layer in rule.layers for name in rule.names_of(layer)}
    whole = {name for rule in rules for name in rule.names if name.startswith(PROJECTOR)}
    for (kind, name), theirs in names.items():
        if name not in (adapted if kind else whole):
            raise CheckpointError(
                f"tensor {theirs} is neither LoRA of the decoder's linear layers nor the projection's",
                where=str(folder),
                fix="merge the adapter with peft and import the whole model",
            )


def _stack(rule: Rule, parts: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return A float[sum of ranks, inputs] and B float[outputs, sum of ranks] of a fused matrix.

    Args:
        rule: of the matrix.
        parts: A and B of their matrices; None for one that is not adapted, which keeps rows of zeros.
    """
    stacked = torch.cat([pair[0] for pair in parts if pair is not None])
    rows, begin = [], 0
    for pair, (outputs, inputs) in zip(parts, rule.their_shapes(), strict=True):
        wide = torch.zeros(outputs, stacked.size(0), dtype=stacked.dtype)
        if pair is not None:
            a, b = pair
            if a.size(1) != inputs or b.shape != (outputs, a.size(0)):
                raise CheckpointError(
                    f"A {list(a.shape)} and B {list(b.shape)} do not fit a matrix of {outputs} x {inputs}",
                    where=rule.names[0],
                    fix="name the base that was adapted",
                )
            wide[:, begin : begin + a.size(0)] = b
            begin += a.size(0)
        rows.append(wide)
    return stacked, rule.transform.join(rows)
