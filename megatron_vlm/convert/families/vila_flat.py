"""The family of VILA 1.0 and LLaVA-1.5 in their own code: all weights under one name, a tower known by its name.

config.json says nothing about the tower but its name: that of a published one, or of a folder.

Source: https://github.com/NVlabs/VILA and https://github.com/haotian-liu/LLaVA, llava/model/llava_arch.py.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig, load_preset
from megatron_vlm.config.towers import Tower, TowerConfig, innermost
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.convert.family import (
    Family,
    Parts,
    Serving,
    decoder_family,
    family_of,
    find_family,
    find_tower_family,
)
from megatron_vlm.convert.files.language import write_language_files
from megatron_vlm.convert.files.model_card import CardFormat, write_card
from megatron_vlm.convert.folder import CONFIG_NAME, HFFolder, read_json, write_json
from megatron_vlm.convert.projector import find_projector, projector_of_vila
from megatron_vlm.convert.rules import Rule
from megatron_vlm.convert.vila_settings import (
    model_projector,
    processor_settings,
    read_tower,
    serving_settings,
    tokenizer_settings,
    tower_family,
    tower_settings,
)
from megatron_vlm.convert.whole_model import join_patterns, join_rules, prefixed, refusal

PART = "model"
MODEL_TYPES = ("LlavaLlamaForCausalLM", "llava_llama")
ARCHITECTURE = "LlavaLlamaForCausalLM"
_PROJECTOR, _VISION = "model.mm_projector.", "model.vision_tower.vision_tower."
_TOWER_PATTERN = r"(?:model\.)?vision_tower\.(?:vision_tower\.)?"
_TOWER_FOLDER = "vision_tower"
"""Has the settings of a tower of other sizes than the published ones."""
_PUBLISHED = {
    "openai/clip-vit-large-patch14-336": "clip-l14-336",
    "openai/clip-vit-large-patch14": "clip-l14-224",
}
"""Names of towers, and our presets of them."""
_CARD = CardFormat(
    title=f"A vision-language model for `{ARCHITECTURE}`",
    usage="""
The folder has the layout of VILA-1.0 and LLaVA-1.5, for their code. `mm_vision_tower` in config.json names the tower;
its weights are here. Every image is followed by a line break.
""",
)


def find_parts(path: Path, settings: dict[str, Any], tower: Path | None) -> Parts:
    """Return the folder, and what its tower is: that of `mm_vision_tower`.

    Weights of the tower in the folder itself count more than those of `tower`.
    """
    name = str(settings.get("mm_vision_tower"))
    if tower is None and Path(name).name == name and (path / name / CONFIG_NAME).is_file():
        tower = path / name
    has_tower = any(re.match(_TOWER_PATTERN, stored) for stored in HFFolder(path).stored)
    if tower is not None:
        vision = read_json(tower / CONFIG_NAME)
    elif has_tower and name in _PUBLISHED:
        # All layers: the one whose output the projection gets is counted from the end.
        vision = _clip().config_to_hf(replace(load_preset(Tower, _PUBLISHED[name]), feature_layer=-1))
    else:
        what = "settings" if has_tower else "weights"
        raise CheckpointError(
            f"the {what} of the tower {name} are not in the folder",
            where=str(path),
            fix="name its folder with --vision",
        )
    return Parts(
        settings={**settings, "vision_config": vision},
        language=settings,
        weights={"": path} if has_tower or tower is None else {_VISION: tower, "": path},
        tokenizer=path,
        processor=tower or path,
    )


def renames(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return those of the tower, and the names without the level of the decoder."""
    tower = family_of(settings["vision_config"], "vision", f"the {CONFIG_NAME} of the tower")
    return [
        *(
            (_TOWER_PATTERN + pattern, _VISION + replacement)
            for pattern, replacement in tower.renames(settings["vision_config"])
        ),
        (_TOWER_PATTERN, _VISION),
        (r"mm_projector\.", _PROJECTOR),
    ]


def _clip() -> Family:
    return find_family("clip", "vision", "model.vision")


def reason_against(model: ModelConfig) -> str | None:
    """Return what the code of VILA 1.0 does not have."""
    inner = innermost(model.vision)
    if not isinstance(inner, ClipConfig):
        return f"a tower of type {inner.type} does not fit the format vila-flat, whose code has those of CLIP only"
    # The code has the same projections as transformers' Llava.
    if not find_projector(model.projection.type).FITS_LLAVA:
        return (
            f"a projection of type {model.projection.type} does not fit the format vila-flat, whose code has linear "
            "and mlp2x_gelu only"
        )
    return refusal(model.vision, tower_family)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of the whole model."""
    projector = [
        replace(rule, names=tuple(name.removeprefix("layers.") for name in rule.names))
        for rule in model_projector(model).rules
    ]
    return join_rules(
        {
            _VISION: tower_family(model.vision).rules(innermost(model.vision)),
            _PROJECTOR: projector,
            "": decoder_family().rules(model.language),
        }
    )


def unused(model: ModelConfig) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return join_patterns(
        {
            _VISION: tower_family(model.vision).unused(innermost(model.vision)),
            "": decoder_family().unused(model.language),
        }
    )


def constants(model: ModelConfig) -> Mapping[str, Tensor]:
    """Return tensors that a folder must have and our model lacks, with values that have no effect."""
    return prefixed(_VISION, tower_family(model.vision).constants(innermost(model.vision)))


def _published_name(tower: TowerConfig) -> str | None:
    """Return the name of a published tower of the same sizes."""
    free = find_tower_family(tower.type).FREE
    for name, preset in _PUBLISHED.items():
        published = load_preset(Tower, preset)
        if all(
            getattr(tower, one.name) == getattr(published, one.name)
            for one in fields(published)
            if one.name not in free
        ):
            return name
    return None


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return config.json without the type of the weights and the ids of the tokenizer.

    A published tower is named; its layers behind the one whose output the projection gets are left out. Any other one
    ends with that layer.
    """
    inner = cast(ClipConfig, innermost(model.vision))
    name = _published_name(inner)
    return {
        **decoder_family().config_to_hf(model.language),
        "architectures": [ARCHITECTURE],
        "model_type": "llava_llama",
        "mm_vision_tower": name or _TOWER_FOLDER,
        # The code then makes the tower before it reads the weights, which replace those of the published one.
        "unfreeze_mm_vision_tower": True,
        "mm_projector_type": model_projector(model).type,
        **tower_settings(model.vision, inner.feature_layer if name else -1),
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> ModelConfig:
    """Return our settings.

    Args:
        settings: config.json of a LlavaLlamaForCausalLM, with that of its tower in `vision_config`.
        where: the file, for messages.
        chosen: fields that override the file, and `vocab_size`, the tokens of the tokenizer; without it, all rows.

    Raises:
        CheckpointError: our model does not support something in the settings.
    """
    sizes = {} if (vocab_size := chosen.pop("vocab_size", None)) is None else {"vocab_size": vocab_size}
    tower = settings["vision_config"]
    found = {
        "language": decoder_family().config_from_hf(settings, where=where, **sizes),
        "vision": read_tower(settings, family_of(tower, "vision", f"the {CONFIG_NAME} of the tower"), tower, where),
        "projection": projector_of_vila(settings.get("mm_projector_type", "linear"), where),
    }
    return ModelConfig(**{**found, **chosen})


def write_settings(folder: Path, serving: Serving) -> None:
    """Write all files except the weights: config.json, tokenizer, chat template, settings of the tower, model card."""
    config = config_to_hf(serving.model)
    write_language_files(folder, serving)
    if config["mm_vision_tower"] == _TOWER_FOLDER:
        (folder / _TOWER_FOLDER).mkdir()
        tower = tower_family(serving.model.vision).config_to_hf(innermost(serving.model.vision))
        write_json(folder / _TOWER_FOLDER / CONFIG_NAME, tower)
        write_json(folder / _TOWER_FOLDER / "preprocessor_config.json", processor_settings(serving))
    write_json(folder / CONFIG_NAME, {**config, **serving_settings(serving), **tokenizer_settings(serving)})
    write_card(folder, serving, _CARD)
