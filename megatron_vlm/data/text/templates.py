"""Conversation templates: from turns to segments, each with its loss mask.

Training and inference use the same function, so a prompt is exactly the beginning of a training sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import PLACEHOLDER, Control, Document, Image, Segment, Special, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.samples import ImageSegment, TextSegment
from megatron_vlm.data.text.encoding import encode_segments
from megatron_vlm.data.text.tokenizer import Tokenizer

_EOS, _BOS = Special(Control.EOS), Special(Control.BOS)
_Fragment = str | Special


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    question: tuple[Text | Image, ...]
    answer: str | None
    """None in the last turn of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The text around system prompt, questions and answers; `{}` stands for the content."""

    name: str
    system_text: str | None
    """Default system prompt."""
    system: tuple[_Fragment, ...] = ()
    no_system: tuple[_Fragment, ...] = ()
    """Replaces `system` if there is no system prompt."""
    before_question: tuple[_Fragment, ...] = ()
    question_text: bool = True
    """Whether the text of a question is used; otherwise only its images are."""
    after_question: tuple[_Fragment, ...] = ()
    answer: str = "{}"
    after_answer: tuple[_Fragment, ...] = ()
    """Trained, like the answer."""
    between: tuple[_Fragment, ...] = ()
    """Between two turns."""

    def choose_system(self, system: object) -> str | None:
        """Return the system prompt to write: `system`, or the template's own for DEFAULT_SYSTEM; None for none."""
        return self.system_text if system is DEFAULT_SYSTEM else None if system is None else str(system)


_LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_START, _END = Special("<|im_start|>"), Special("<|im_end|>")
_HEADER, _HEADER_END, _TURN_END = Special("<|start_header_id|>"), Special("<|end_header_id|>"), Special("<|eot_id|>")
_CHATML: dict[str, Any] = {
    "system": (_START, "system\n{}", _END, "\n"),
    "before_question": (_START, "user\n"),
    "after_question": (_END, "\n", _START, "assistant\n"),
    "after_answer": (_END,),
    "between": ("\n",),
}

# Source: LLaVA, llava/conversation.py; VILA, llava/conversation.py. The last three follow the models' own chat
# templates, from which VILA's code differs: it has no line break after <|im_end|> and ends Llama 3's last answer with
# <|end_of_text|>. Their markers are single tokens, which the tokenizer must have. The models' own templates write
# a line break after the last <|im_end|>, too; here a sample ends with the token that ends the answer.
_ALL = (
    Template(
        name="vicuna_v1",
        system_text=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        ),
        system=("{} ",),
        no_system=(" ",),
        before_question=("USER: ",),
        after_question=(" ASSISTANT:",),
        answer=" {}",
        after_answer=(_EOS,),
    ),
    Template(name="plain", system_text=None, question_text=False, answer="{}\n"),
    Template(
        name="llama_2",
        system_text=_LLAVA_SYSTEM,
        system=("[INST] <<SYS>>\n{}\n<</SYS>>\n\n",),
        no_system=("[INST] ",),
        after_question=(" [/INST]",),
        answer=" {} ",
        after_answer=(_EOS,),
        between=(_BOS, "[INST] "),
    ),
    Template(
        name="hermes-2",
        system_text="Answer the questions.",
        **_CHATML,
    ),
    Template(
        name="chatml",
        system_text="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        **_CHATML,
    ),
    Template(
        name="llama_3",
        system_text=_LLAVA_SYSTEM,
        system=(_HEADER, "system", _HEADER_END, "\n\n{}", _TURN_END),
        before_question=(_HEADER, "user", _HEADER_END, "\n\n"),
        after_question=(_TURN_END, _HEADER, "assistant", _HEADER_END, "\n\n"),
        after_answer=(_TURN_END,),
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}

DEFAULT_SYSTEM = object()
"""Use the template's own system prompt."""


def find_template(name: str) -> Template:
    """Return the template of this name.

    Raises:
        ConfigError: there is no such template.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown conversation template {name!r}", fix=f"choose from {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def find_system(name: str) -> object:
    """Return the system prompt for `render_conversation`: "default" (the template's own), "none", or the text."""
    return {"default": DEFAULT_SYSTEM, "none": None}.get(name, name)


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Encode a turn, so that a template that does not fit the tokenizer fails before any data is read.

    Raises:
        ConfigError: the tokenizer lacks a token of the template, such as <|eot_id|>.
    """
    encode_conversation([Turn((Text("question"),), "answer")], tokenizer, template=template)


def stop_ids(template: Template | None, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end an answer: EOS, and those that end a turn of the template, such as <|eot_id|>.

    Raises:
        ConfigError: the tokenizer lacks a token of the template.
    """
    ends = template.after_answer if template else ()
    (segment,) = encode_segments((_EOS, *(end for end in ends if isinstance(end, Special))), tokenizer)
    return frozenset(segment.input_ids.tolist())  # type: ignore[union-attr]


def split_placeholders(text: str, images: Sequence[Image]) -> tuple[Text | Image, ...]:
    """Replace the placeholders of a question by images.

    Raises:
        RejectError: the numbers of placeholders and images differ.
    """
    chunks = text.split(PLACEHOLDER)
    if len(chunks) - 1 != len(images):
        raise RejectError("placeholder_count", f"{len(chunks) - 1} placeholders for {len(images)} images")
    segments: list[Text | Image] = [Text(chunks[0])]
    for image, chunk in zip(images, chunks[1:], strict=True):
        segments += [image, Text(chunk)]
    return tuple(segment for segment in segments if isinstance(segment, Image) or segment.text)


def render_conversation(turns: Sequence[Turn], template: Template, system: object = DEFAULT_SYSTEM) -> Document:
    """Return the conversation as segments, BOS first; answers and the text that ends them are trained.

    Args:
        turns: in order. If the last answer is None, the result ends where the assistant begins to speak.
        template: the texts around questions and answers.
        system: system prompt; None for no system prompt, DEFAULT_SYSTEM for the template's.

    Raises:
        ValueError: there is no turn, or an answer other than the last is None.
    """
    if not turns or any(turn.answer is None for turn in turns[:-1]):
        raise ValueError("a conversation needs turns, and an answer in all but the last")
    system_text = template.choose_system(system)
    segments: list[Segment] = [Special(Control.BOS, train=False)]
    segments += _fill(template.no_system if system_text is None else template.system, system_text or "", train=False)
    for number, turn in enumerate(turns):
        if number:
            segments += _fill(template.between, "", train=False)
        segments += _fill(template.before_question, "", train=False)
        for segment in turn.question:
            if isinstance(segment, Image):
                segments.append(segment)
            elif template.question_text:
                segments.append(Text(segment.text, train=False))
        segments += _fill(template.after_question, "", train=False)
        if turn.answer is not None:
            segments += _fill((template.answer, *template.after_answer), turn.answer, train=True)
    return Document(tuple(_merge(segments)))


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, template: Template, system: object = DEFAULT_SYSTEM
) -> tuple[TextSegment | ImageSegment, ...]:
    """Return the token ids and images of a conversation, with BOS; see `render_conversation`."""
    return encode_segments(render_conversation(turns, template, system).segments, tokenizer)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, template: Template, system: object = DEFAULT_SYSTEM
) -> tuple[TextSegment | ImageSegment, ...]:
    """Return the token ids and images up to the point where the assistant begins its last answer, which is ignored."""
    open_turns = [*turns[:-1], *(Turn(turn.question, None) for turn in turns[-1:])]
    return encode_conversation(open_turns, tokenizer, template=template, system=system)


def _fill(fragments: Iterable[_Fragment], content: str, *, train: bool) -> list[Segment]:
    # str.replace, not str.format: system prompts and answers contain braces.
    return [
        Special(one.token, train) if isinstance(one, Special) else Text(one.replace("{}", content, 1), train)
        for one in fragments
    ]


def _merge(segments: Iterable[Segment]) -> list[Segment]:
    """Merge neighbouring texts with the same mask, since they are tokenised as a whole."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if isinstance(segment, Text) and isinstance(last, Text) and segment.train == last.train:
            merged[-1] = Text(last.text + segment.text, last.train)
        elif not isinstance(segment, Text) or segment.text:
            merged.append(segment)
    return merged
