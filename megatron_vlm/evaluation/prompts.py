"""Turn a question about images, after any worked examples, into the token ids of a prompt."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config import ModelConfig, UsageError
from megatron_vlm.data.documents import PLACEHOLDER, Control, Image, Segment, Special, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.samples import ImageSegment, TextSegment
from megatron_vlm.data.text.encoding import encode_segments
from megatron_vlm.data.text.templates import Template, Turn, encode_prompt, split_placeholders
from megatron_vlm.data.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question; in a worked example, also its answer."""

    text: str
    """May contain "<image>" at the place of each image; otherwise the images come first, on lines of their own."""
    num_images: int
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How prompts are written: in the same form as the conversations of the training.

    Args:
        tokenizer: tokenizer of the model.
        model: sizes of the model.
        template: conversation template; None: the model continues the bare text.
        system: system prompt, as in `render_conversation`.
    """

    tokenizer: Tokenizer
    model: ModelConfig
    template: Template | None
    system: object

    def encode(self, exchanges: Sequence[Exchange]) -> np.ndarray:
        """Return int64[n] ids up to the answer of the last question, with placeholders for each image.

        Raises:
            UsageError: a text has placeholders, but their number is not the number of images.
        """
        if self.template is None:
            return self._place(encode_segments(self._bare(exchanges), self.tokenizer))
        turns = [Turn(_split(exchange), exchange.answer) for exchange in exchanges]
        return self._place(encode_prompt(turns, self.tokenizer, template=self.template, system=self.system))

    def check_room(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Check that prompts of these lengths leave positions for an answer; warn if it may end before its last token.

        Raises:
            UsageError: a prompt fills all positions that the model was made for.
        """
        positions = self.model.language.max_position_embeddings
        too_long = [length for length in lengths if length >= positions]
        if too_long:
            raise UsageError(
                f"{len(too_long)} of {len(lengths)} prompts fill the {positions} positions of the model "
                f"(max_position_embeddings); the longest has {max(too_long)} tokens",
                fix="shorten the text, or give fewer images or worked examples",
            )
        left = positions - max(lengths)
        if left < max_new_tokens:
            logger.warning(
                "the model has %d positions (max_position_embeddings): the answer to the longest prompt ends after "
                "%d tokens, not %d",
                positions,
                left,
                max_new_tokens,
            )

    def _bare(self, exchanges: Sequence[Exchange]) -> list[Segment]:
        segments: list[Segment] = [Special(Control.BOS, train=False)]
        for exchange in exchanges:
            segments += [item if isinstance(item, Image) else Text(item.text, False) for item in _split(exchange)]
            if exchange.answer is not None:
                segments.append(Text(f" {exchange.answer}\n", train=False))
        return segments

    def _place(self, segments: Sequence[TextSegment | ImageSegment]) -> np.ndarray:
        num_image_tokens = self.model.fixed_image_tokens("generation")
        placeholders = np.full(num_image_tokens, self.model.language.image_token_id, dtype=np.int64)
        ids = [placeholders if isinstance(segment, ImageSegment) else segment.input_ids for segment in segments]
        return np.concatenate(ids).astype(np.int64)


def _split(exchange: Exchange) -> tuple[Text | Image, ...]:
    """Return text and images in reading order; the images are empty, since only their places matter."""
    text = exchange.text
    if PLACEHOLDER not in text:
        text = f"{PLACEHOLDER}\n" * exchange.num_images + text
    try:
        return split_placeholders(text, [Image(b"")] * exchange.num_images)
    except RejectError:
        raise UsageError(
            f"{text.count(PLACEHOLDER)} placeholders for {exchange.num_images} images in {exchange.text[:60]!r}",
            fix=f"write {PLACEHOLDER} once for each image, or not at all",
        ) from None
