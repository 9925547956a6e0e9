from dataclasses import dataclass, fields, replace
from typing import Annotated

import pytest

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.adapters.lora import Config as Lora
from megatron_vlm.config.adapters.visual_expert import Config as VisualExpert
from megatron_vlm.config.comparison import FREE, IN_NEW_STAGE, Compared, Difference, MayChange, compare_settings
from megatron_vlm.config.projectors import make_projector
from tests.support.configs import tiny_model, tiny_model_with_tower


@dataclass(frozen=True, kw_only=True)
class Section:
    kept: int = 1
    learned_anew: Annotated[int, IN_NEW_STAGE] = 1
    free: Annotated[int, FREE] = 1
    maybe: Annotated[int | None, Compared(stands_for="really")] = None

    @property
    def really(self) -> int:
        return self.maybe or 7


@dataclass(frozen=True, kw_only=True)
class WithAnotherDefault(Section):
    free: int = 2


def differences(first, second):
    return [(one.key, one.may_change) for one in compare_settings("model", first, second)]


def test_equal_settings_do_not_differ():
    assert not differences(tiny_model(), tiny_model())


@pytest.mark.parametrize(
    ("name", "may_change"),
    [("kept", MayChange.NEVER), ("learned_anew", MayChange.NEW_STAGE), ("free", MayChange.ALWAYS)],
)
def test_a_field_says_whether_it_may_change(name, may_change):
    assert differences(Section(), Section(**{name: 3})) == [(f"model.{name}", may_change)]


def test_a_subclass_with_another_default_keeps_what_the_field_says():
    assert differences(WithAnotherDefault(), WithAnotherDefault(free=3)) == [("model.free", MayChange.ALWAYS)]


def test_none_equals_the_value_that_it_stands_for():
    assert not differences(Section(), Section(maybe=7))
    assert list(compare_settings("x", Section(), Section(maybe=8))) == [Difference("x.maybe", 7, 8, MayChange.NEVER)]


def with_language(**changes) -> ModelConfig:
    return replace(tiny_model(), language=replace(tiny_model().language, **changes))


def with_tower(type="clip", **settings) -> ModelConfig:
    return tiny_model_with_tower(type, **settings)


def adapted(adapter) -> ModelConfig:
    return replace(tiny_model(), adapter=adapter)


SILENT = {
    "heads": (with_language(), with_language(num_attention_heads=8, num_query_groups=4, kv_channels=8)),
    "rotary base": (with_language(), with_language(rotary_base=1e6)),
    "decoder norm": (with_language(), with_language(layernorm_epsilon=1e-6)),
    "vocabulary": (with_language(), with_language(vocab_size=121)),
    "tower norm": (with_tower(), with_tower(layernorm_epsilon=1e-6)),
    "activation": (with_tower(), with_tower(activation="gelu")),
    "colours": (with_tower(), with_tower(image_mean=(0.5, 0.5, 0.5))),
    "class token": (with_tower(), with_tower(drop_class_token=False)),
    "features": (with_tower(), with_tower(feature_layer=-1)),
    "image size": (with_tower("radio", image_size=32), with_tower("radio", image_size=48)),
    "table of positions": (with_tower("dinov2", position_grid=8), with_tower("dinov2", position_grid=9)),
    "norm behind the tower": (with_tower("dinov2"), with_tower("dinov2", post_norm=False)),
    "registers": (with_tower("radio"), with_tower("radio", num_class_tokens=3, num_registers=5)),
    "scales": (with_tower("s2"), replace(with_tower("s2"), vision=replace(with_tower("s2").vision, scales=(32, 96)))),
    "tower in the scales": (with_tower("s2"), with_tower("s2", activation="gelu")),
    "token order": tuple(
        replace(tiny_model(), projection=replace(make_projector("downsample"), token_order=order))
        for order in ("row", "column")
    ),
    "adapter scale": (adapted(Lora(alpha=16.0)), adapted(Lora(alpha=32.0))),
    "adapter": (adapted(Lora()), adapted(VisualExpert())),
    "no adapter": (adapted(Lora()), adapted(None)),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_changes_the_function_may_not_change_in_a_run(name):
    found = differences(*SILENT[name])
    assert found
    assert all(may_change is not MayChange.ALWAYS for _, may_change in found)


def test_only_these_settings_of_a_model_may_always_change():
    free = with_language(init_method_std=0.5, max_position_embeddings=77)
    free = replace(free, backend="transformer_engine", vision=replace(free.vision, init_method_std=0.5))
    found = differences(replace(tiny_model(), adapter=Lora()), replace(free, adapter=Lora(dropout=0.5)))
    assert {may_change for _, may_change in found} == {MayChange.ALWAYS}
    assert {key.rsplit(".", 1)[-1] for key, _ in found} == {
        "init_method_std",
        "max_position_embeddings",
        "backend",
        "dropout",
    }


def test_an_adapter_of_another_type_is_named_by_its_type():
    (found,) = compare_settings("model", *SILENT["no adapter"])
    assert (found.key, found.first, found.second) == ("model.adapter.type", "lora", None)


def test_every_setting_of_the_decoder_is_compared():
    names = {field.name for field in fields(tiny_model().language)}
    changed = {name: value for name, value in DECODER.items() if name in names}
    assert changed.keys() == names
    for name, value in changed.items():
        assert f"model.language.{name}" in dict(differences(tiny_model(), with_language(**{name: value})))


DECODER = {
    "vocab_size": 99,
    "num_layers": 3,
    "hidden_size": 64 * 2,
    "ffn_hidden_size": 7,
    "num_attention_heads": 2,
    "num_query_groups": 4,
    "kv_channels": 8,
    "max_position_embeddings": 5,
    "rotary_base": 5.0,
    "layernorm_epsilon": 0.5,
    "share_embeddings_and_output_weights": True,
    "init_method_std": 0.5,
}
