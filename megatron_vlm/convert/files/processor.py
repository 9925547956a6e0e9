"""Files for serving, apart from weights and tokenizer: image processing, chat template, generation settings."""

from pathlib import Path
from typing import Any

from megatron_vlm.config import LanguageConfig
from megatron_vlm.config.towers import TowerConfig
from megatron_vlm.config.vision_transformer import VisionTransformerConfig
from megatron_vlm.convert.folder import write_json
from megatron_vlm.data.documents import Control, Special
from megatron_vlm.data.loading.pixels import Aspect
from megatron_vlm.data.text.templates import Template

_BICUBIC = 3
_SET_ANSWER = (
    "{% if message['content'] is string %}{% set answer = message['content'] %}{% else %}"
    "{% set answer = message['content'] | map(attribute='text') | join %}{% endif %}"
)


def image_processor_config(vision: TowerConfig, aspect: Aspect) -> dict[str, Any]:
    """Return preprocessor_config.json: the pixels of training, up to the rounding of the resampling filter."""
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        # Only LLaVA's own class pads; the other two aspects are plain CLIP processing, which every version has and
        # which fits every tower: the numbers below are its own.
        "image_processor_type": "LlavaImageProcessor" if aspect == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if aspect == "pad" else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if aspect == "resize" else {"shortest_edge": vision.image_size},
        "resample": _BICUBIC,
        "do_center_crop": aspect != "resize",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def select_strategy(vision: VisionTransformerConfig) -> str:
    """Return the name in LLaVA for the features that the projection gets: without the class token, or all of them."""
    dropped = vision.num_prefix_tokens - vision.constant_grid.num_prefix_tokens
    return "default" if dropped else "full"


def processor_config(vision: VisionTransformerConfig, image_token: str) -> dict[str, Any]:
    """Return processor_config.json: the number of placeholders per image."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": vision.num_prefix_tokens,  # the class token, which "default" removes again
        "vision_feature_select_strategy": select_strategy(vision),
    }


def generation_config(language: LanguageConfig, *, bos_id: int | None, eos_ids: list[int]) -> dict[str, Any]:
    """Return generation_config.json; ids without a tokenizer piece are never generated."""
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        "pad_token_id": language.pad_token_id,
        "suppress_tokens": list(range(language.vocab_size, language.num_token_ids)),
    }


def chat_template(template: Template, system: object, *, start: str, bos: str, eos: str, image: str | None) -> str:
    """Return the conversation template as Jinja; the rendered text is tokenized to the ids of training.

    Each image of a message is followed by a line break, as in LLaVA.

    Args:
        template: the template used in training.
        system: system prompt of a conversation without one, as in `render_conversation`.
        start: text with which a sample starts.
        bos: text of the token that starts a sample, for templates that repeat it.
        eos: text of the token that ends an answer.
        image: text of the placeholder; None where the item of an image has the type "media_marker" and a text for it,
            as llama.cpp makes them.
    """
    system_text = template.choose_system(system)
    marks = {Control.BOS: bos, Control.EOS: eos}

    def text(elements: tuple[str | Special, ...], content: str = "") -> str:
        rendered = []
        for element in elements:
            if isinstance(element, Special):
                rendered.append(_literal(marks.get(element.token, element.token)))  # type: ignore[arg-type]
                continue
            before, _, after = element.partition("{}")
            rendered += [_literal(before), *([content, _literal(after)] if "{}" in element else [])]
        return "".join(rendered)

    return "".join(
        (
            _choose_system("none" if system_text is None else _quote(system_text)),
            _literal(start),
            f"{{% if system is none %}}{text(template.no_system)}{{% else %}}",
            text(template.system, "{{ system }}") + "{% endif %}",
            "{% for message in turns %}{% if message['role'] == 'user' %}",
            f"{{% if not loop.first %}}{text(template.between)}{{% endif %}}",
            text(template.before_question) + _question(image) + text(template.after_question),
            "{% elif message['role'] == 'assistant' %}",
            _SET_ANSWER + text((template.answer, *template.after_answer), "{{ answer }}"),
            "{% endif %}{% endfor %}",
        )
    )


def _choose_system(default: str) -> str:
    """Return Jinja that sets `system` to the conversation's own prompt or the default, and `turns` to the rest."""
    return "".join(
        (
            "{% if messages[0]['role'] == 'system' %}",
            "{% if messages[0]['content'] is string %}{% set system = messages[0]['content'] %}{% else %}",
            "{% set system = messages[0]['content'] | map(attribute='text') | join %}{% endif %}",
            "{% set turns = messages[1:] %}{% else %}",
            f"{{% set system = {default} %}}{{% set turns = messages %}}{{% endif %}}",
        )
    )


def _question(image: str | None) -> str:
    """Return Jinja that writes a question with its images in place."""
    kind, placeholder, text = "image", _literal(image or ""), "{{ message['content'] }}"
    if image is None:
        kind, placeholder = "media_marker", "{{ item['text'] }}"
        # Many versions of llama.cpp make one text of the items, with markers like <__media__>.
        text = (
            "{% for part in message['content'].split('<__media') %}"
            "{{ part if loop.first else '<__media' + part | replace('__>', '__>\\n') }}{% endfor %}"
        )
    return "".join(
        (
            "{% if message['content'] is string %}" + text + "{% else %}{% for item in message['content'] %}",
            f"{{% if item['type'] == '{kind}' %}}" + placeholder + _literal("\n"),
            "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}",
        )
    )


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _literal(value: str) -> str:
    """Return Jinja that prints the text unchanged; string literals are exempt from its trimming of line breaks."""
    return f"{{{{ {_quote(value)} }}}}" if value else ""


def write_processor(folder: Path, vision: VisionTransformerConfig, aspect: Aspect, image_token: str) -> None:
    """Write preprocessor_config.json and processor_config.json."""
    write_json(folder / "preprocessor_config.json", image_processor_config(vision, aspect))
    write_json(folder / "processor_config.json", processor_config(vision, image_token))
