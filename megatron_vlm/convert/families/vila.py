"""The family of VILA 1.5: a language model, a tower and a projection, each in a folder of its own.

Source: https://github.com/NVlabs/VILA, llava/model/llava_arch.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm.config import CheckpointError, ModelConfig
from megatron_vlm.config.towers import innermost
from megatron_vlm.convert.family import Parts, Serving, decoder_family, family_of, find_family, refuse_tower
from megatron_vlm.convert.files.language import write_language_files
from megatron_vlm.convert.files.model_card import CardFormat, write_card
from megatron_vlm.convert.folder import CONFIG_NAME, read_json, write_json
from megatron_vlm.convert.projector import projector_of_vila
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
from megatron_vlm.convert.whole_model import join_patterns, join_renames, join_rules, prefixed, refusal

PART = "model"
MODEL_TYPES = ("LlavaLlamaModel",)
ARCHITECTURE = "LlavaLlamaModel"
_LANGUAGE, _VISION, _PROJECTOR = "llm", "vision_tower", "mm_projector"
_CARD = CardFormat(
    title=f"A vision-language model for `{ARCHITECTURE}`",
    usage="""
The folder has the layout of VILA-1.5, for TensorRT-LLM, TinyChat and VILA's own code; its path must not contain a dot.
`llm/` and `vision_tower/` are folders of transformers. Every image is followed by a line break.
""",
)


def find_parts(path: Path, settings: dict[str, Any], tower: Path | None) -> Parts:
    """Return the three folders; that of the tower may be elsewhere."""
    folders = {name: path / name for name in (_LANGUAGE, _VISION, _PROJECTOR)}
    if not (folders[_VISION] / CONFIG_NAME).is_file():
        if tower is None:
            raise CheckpointError(
                f"the tower {settings.get('vision_tower_cfg')} is not in the folder",
                where=str(folders[_VISION]),
                fix="name its folder with --vision",
            )
        folders[_VISION] = tower
    else:
        refuse_tower(path, tower)
    parts = {f"{name}_cfg": read_json(folder / CONFIG_NAME) for name, folder in folders.items()}
    return Parts(
        settings={**settings, **parts},
        language=parts[f"{_LANGUAGE}_cfg"],
        weights={f"{name}/": folder for name, folder in folders.items()},
        tokenizer=folders[_LANGUAGE],
        processor=folders[_VISION],
    )


def renames(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return those of the tower."""
    tower = settings[f"{_VISION}_cfg"]
    return join_renames(f"{_VISION}/", family_of(tower, "vision", f"{_VISION}/{CONFIG_NAME}").renames(tower))


def reason_against(model: ModelConfig) -> str | None:
    """Return what has no place in the folders."""
    return refusal(model, rules, config_to_hf)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table of the whole model."""
    return join_rules(
        {
            f"{_VISION}/": tower_family(model.vision).rules(innermost(model.vision)),
            f"{_PROJECTOR}/": model_projector(model).rules,
            f"{_LANGUAGE}/": decoder_family().rules(model.language),
        }
    )


def unused(model: ModelConfig) -> tuple[str, ...]:
    """Return regular expressions for tensors that a folder may hold in addition to the table."""
    return join_patterns(
        {
            f"{_VISION}/": tower_family(model.vision).unused(innermost(model.vision)),
            f"{_LANGUAGE}/": decoder_family().unused(model.language),
        }
    )


def constants(model: ModelConfig) -> Mapping[str, Tensor]:
    """Return tensors that the tower's folder must have and our model lacks, with values that have no effect."""
    return prefixed(f"{_VISION}/", tower_family(model.vision).constants(innermost(model.vision)))


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return config.json without the type of the weights and the ids of the tokenizer.

    The exported tower ends with the layer whose output the projection gets, so the feature layer is the last one. The
    paths of the parts are relative; programs take their last component for the name of a folder.
    """
    parts = {
        _LANGUAGE: decoder_family().config_to_hf(model.language),
        _VISION: tower_family(model.vision).config_to_hf(innermost(model.vision)),
        _PROJECTOR: {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": model_projector(model).type,
        },
    }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llava_llama",
        **{f"{name}_cfg": {"_name_or_path": f"./{name}", **settings} for name, settings in parts.items()},
        "hidden_size": model.language.hidden_size,
        **tower_settings(model.vision, feature_layer=-1),
        "vision_resolution": -1,
        "interpolate_mode": "linear",
        "drop_path_rate": 0.0,
        "mm_projector_lr": None,
        "num_video_frames": 8,
        "resume_path": "./",
        "tune_language_model": True,
        "tune_vision_tower": True,
        "tune_mm_projector": True,
    }


def config_from_hf(settings: dict[str, Any], *, where: str, **chosen: Any) -> ModelConfig:
    """Return our settings.

    The tokens of a projection called `mlp_downsample` are taken in the order of VILA-1.5's code, column by column.

    Args:
        settings: config.json, with those of the three folders in `llm_cfg`, `vision_tower_cfg` and `mm_projector_cfg`.
        where: the file, for messages.
        chosen: fields that override the file, and `vocab_size`, the tokens of the tokenizer; without it, all rows.

    Raises:
        CheckpointError: our model does not support something in the settings.
    """
    language, tower, projector = (settings[f"{name}_cfg"] for name in (_LANGUAGE, _VISION, _PROJECTOR))
    sizes = {} if (vocab_size := chosen.pop("vocab_size", None)) is None else {"vocab_size": vocab_size}
    family = find_family(language.get("model_type"), "language", f"{_LANGUAGE}_cfg of {where}")
    tower_kind = family_of(tower, "vision", f"{_VISION}_cfg of {where}")
    found = {
        "language": family.config_from_hf(language, where=where, **sizes),
        "vision": read_tower(settings, tower_kind, tower, where),
        "projection": projector_of_vila(projector.get("mm_projector_type"), where),
    }
    return ModelConfig(**{**found, **chosen})


def write_settings(folder: Path, serving: Serving) -> None:
    """Write all files except the weights: settings of the model and of its parts, tokenizer, processor, model card."""
    config = {**config_to_hf(serving.model), **serving_settings(serving), "model_dtype": str(serving.dtype)}
    config[f"{_LANGUAGE}_cfg"] |= tokenizer_settings(serving)
    for name in (_VISION, _PROJECTOR):
        config[f"{name}_cfg"]["torch_dtype"] = str(serving.dtype).removeprefix("torch.")
    for name in (_LANGUAGE, _VISION, _PROJECTOR):
        (folder / name).mkdir()
        write_json(folder / name / CONFIG_NAME, config[f"{name}_cfg"])
    write_language_files(folder / _LANGUAGE, serving)
    write_json(folder / _VISION / "preprocessor_config.json", processor_settings(serving))
    write_json(folder / CONFIG_NAME, config)
    write_card(folder, serving, _CARD)
