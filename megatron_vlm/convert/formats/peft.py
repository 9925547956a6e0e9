"""What a run with LoRA learned, as a folder that PEFT loads on top of the exported base."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.checkpoint.base import with_bases
from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.checkpoint.tensors import keys_beside_base, list_tensors, read_tensor
from megatron_vlm.config import CheckpointError
from megatron_vlm.config.adapters import lora
from megatron_vlm.convert.adapter import adapter_shapes
from megatron_vlm.convert.adapters.lora import pair_keys, weight_key
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.family import NO_FORMAT, Described, check_fits
from megatron_vlm.convert.files.model_card import CardFormat, write_card
from megatron_vlm.convert.folder import write_json
from megatron_vlm.convert.history import read_history
from megatron_vlm.convert.output import check_output
from megatron_vlm.convert.peft_names import PROJECTOR, SETTINGS_NAME, WEIGHTS_NAME, last_module, pair_names, to_peft
from megatron_vlm.convert.projector import KEY_PREFIX
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.to_hf import DTYPES, ExportOptions, check_checkpoint
from megatron_vlm.convert.weights_writer import Announced, WeightsWriter
from megatron_vlm.parallel.groups import single_process
from megatron_vlm.platform.files.durable import STORAGE_ERRNOS, folder_beside, storage_errors

_CARD = CardFormat(
    title="A LoRA for `PeftModel`",
    library="peft",
    usage="""
With PEFT, where `BASE` is the export of the checkpoint that the adapter was trained on (`convert to-hf --format llava`)
and `FOLDER` is the folder of this file:

```python
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(BASE)
model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(BASE), FOLDER)
```

Prompts are those of the base, whose card has an example.
""",
    can_verify=False,
)


def export(settings: RunSettings, output: Path, options: ExportOptions) -> str:
    """Write adapter_config.json and adapter_model.safetensors.

    Each of query, key and value gets the A of their fused matrix and its rows of B, so do gate and up projection. A
    projection that learned is in the folder whole, as one of PEFT's `modules_to_save`.

    Args:
        settings: the checkpoint.
        output: the folder; must not exist unless `options.overwrite`.
        options: what concerns whole models is ignored.

    Returns:
        What loads the folder, for people.

    Raises:
        UsageError: the folder exists.
        CheckpointError: the checkpoint is damaged, has no LoRA or learned other weights of decoder and tower, or
            transformers' Llava cannot hold the model.
        StorageError: the disk is full or read-only.
    """
    check_output(output, settings.checkpoint, overwrite=options.overwrite)
    adapter_config = _lora_of(settings)
    check_fits("llava", settings.model)
    fix = "make room or name another folder"
    with single_process(), storage_errors("export not written", output, only=STORAGE_ERRNOS, fix=fix):
        check_checkpoint(settings.checkpoint, llava.rules(settings.model), adapter_shapes(settings.model))
        adapter = _Export(
            checkpoint=settings.checkpoint,
            adapter=adapter_config,
            rules=llava.rules(settings.model),
            has_projection=_learned_projection(settings.checkpoint),
            dtype=None if options.dtype is None else DTYPES[options.dtype],
        )
        with folder_beside(output, is_new=not options.overwrite, replaces=True) as unfinished:
            write_json(unfinished / SETTINGS_NAME, adapter.settings())
            announced = list(adapter.announce())
            writer = WeightsWriter(unfinished, announced, sys.maxsize, WEIGHTS_NAME)
            writer.write(adapter.tensors())
            writer.verify()
            described = Described(
                model=settings.model,
                dtype=reduce(torch.promote_types, (entry.dtype for entry in announced)),
                image_aspect=settings.image_aspect,
                history=read_history(settings.checkpoint),
            )
            write_card(unfinished, described, _CARD, sum(torch.Size(entry.shape).numel() for entry in announced))
    return "PeftModel.from_pretrained"


def _lora_of(settings: RunSettings) -> lora.Config:
    adapter = settings.model.adapter
    if not isinstance(adapter, lora.Config):
        what, fix = (
            ("no LoRA", "name another --format") if adapter is None else (f"the adapter {adapter.type}", NO_FORMAT)
        )
        raise CheckpointError(f"the model has {what}, PEFT holds LoRA", where=str(settings.checkpoint), fix=fix)
    return adapter


def _learned_projection(checkpoint: Path) -> bool:
    """Return whether the projection learned beside the pairs.

    Raises:
        CheckpointError: something else learned, too, or nothing tells what learned.
    """
    learned = {key for key in keys_beside_base(checkpoint) if ".lora." not in key}
    others = sorted(key for key in learned if not key.startswith(KEY_PREFIX))
    if len(with_bases(checkpoint)) == 1 or others:
        what = f"{others[0]} learned beside LoRA and projection" if others else "the checkpoint has no base"
        raise CheckpointError(
            f"{what}, so that a PEFT folder cannot hold what learned",
            where=str(checkpoint),
            fix="export the merged model with --format llava",
        )
    return bool(learned)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """The tensors of a PEFT folder and their origin."""

    checkpoint: Path
    adapter: lora.Config
    rules: list[Rule]
    has_projection: bool
    dtype: torch.dtype | None
    """Of the tensors; None: as in the checkpoint."""

    def settings(self) -> dict[str, Any]:
        """Return adapter_config.json."""
        adapter, ranks = self.adapter, {}
        for target, rule in self._targets():
            for name in rule.names:
                ranks[last_module(name)] = adapter.rank_of(target)
        others = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": adapter.rank,
            "lora_alpha": _short(adapter.alpha),
            "lora_dropout": adapter.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            # The tower has layers of the same names.
            "target_modules": rf".*language_model.*\.({'|'.join(ranks)})",
            "modules_to_save": [PROJECTOR] if self.has_projection else None,
            "rank_pattern": others,
            "alpha_pattern": {name: _short(adapter.scale * rank) for name, rank in others.items()},
        }

    def announce(self) -> Iterator[Announced]:
        """Describe every tensor."""
        stored = list_tensors(self.checkpoint)
        for target, rule in self._targets():
            rank, (_, inputs), dtype = self.adapter.rank_of(target), rule.shape, stored[pair_keys(target)[0]][1]
            for layer in rule.layers:
                for name, (outputs, _) in zip(rule.names_of(layer), rule.their_shapes(), strict=True):
                    a, b = pair_names(name)
                    yield Announced(a, (rank, inputs), self.dtype or dtype)
                    yield Announced(b, (outputs, rank), self.dtype or dtype)
        for rule in self._projection():
            for name, shape in zip(rule.names, rule.their_shapes(), strict=True):
                yield Announced(to_peft(name), shape, self.dtype or stored[rule.key][1])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, made when it is asked for."""
        for target, rule in self._targets():
            for layer in rule.layers:
                a, b = (self._read(key, layer) for key in pair_keys(target))
                for name, rows in zip(rule.names_of(layer), rule.transform.split(b), strict=True):
                    name_of_a, name_of_b = pair_names(name)
                    yield name_of_a, a
                    yield name_of_b, rows
        for rule in self._projection():
            whole = self._read(rule.key)
            for name, tensor in zip(rule.names, rule.transform.split(whole), strict=True):
                yield to_peft(name), tensor

    def _read(self, key: str, layer: int | None = None) -> Tensor:
        tensor = read_tensor(self.checkpoint, key, layer)
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _targets(self) -> Iterator[tuple[lora.Target, Rule]]:
        rules = {rule.key: rule for rule in self.rules}
        return ((target, rules[weight_key(target)]) for target in self.adapter.targets)

    def _projection(self) -> Iterator[Rule]:
        return (rule for rule in self.rules if self.has_projection and rule.key.startswith(KEY_PREFIX))


def _short(number: float) -> float:
    return int(number) if number == int(number) else number
