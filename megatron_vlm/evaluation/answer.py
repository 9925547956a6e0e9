"""Answer prompts with a key/value cache, many at a time."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.inference import SamplingOptions
from megatron_vlm.costs.memory import cache_bytes
from megatron_vlm.evaluation.sampling import choose_tokens, draw_uniforms
from megatron_vlm.models.layers.attention import PackedAttention
from megatron_vlm.models.vlm import VisionLanguageModel, merge_image_embeddings

# Measured on two cores with the quickstart's model: larger batches are no faster.
POSITIONS_PER_BATCH = 16_384
CACHE_BYTES = 2**31
"""Largest key/value cache [bytes]; a large model answers fewer positions together."""
IMAGES_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to the point where the answer begins, and the images among them."""

    input_ids: np.ndarray
    """int64[n], each image as its placeholders."""
    images: tuple[int, ...]
    """Rows of the features passed to `generate`, in reading order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt."""

    number: int
    """Index of the prompt."""
    ids: list[int]
    """Token ids, without the token that ended the answer."""


class Generator:
    """A model, ready to answer.

    Args:
        model: the whole model, in this process, without gradients; see `open_model`.
        config: sizes of the model.
        stop_ids: tokens that end an answer, each of them.
        positions_per_batch: most positions answered together, among prompts of one length; fewer if the cache would
            exceed CACHE_BYTES.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        config: ModelConfig,
        *,
        stop_ids: Collection[int],
        positions_per_batch: int = POSITIONS_PER_BATCH,
    ) -> None:
        self._model, self._config, self._stop_ids = model, config, frozenset(stop_ids)
        self._num_image_tokens = config.fixed_image_tokens("generation")
        language = config.language
        parameter = next(model.parameters())
        itemsize = parameter.dtype.itemsize
        self._positions_per_batch = min(positions_per_batch, CACHE_BYTES // cache_bytes(language, itemsize))
        self._device = parameter.device
        # With a filled cache and several new positions, megatron-core does not ask transformer-engine for a mask.
        self._can_continue = isinstance(
            model.language_model.decoder.layers[0].self_attention.core_attention, PackedAttention
        )

    @property
    def feature_bytes(self) -> int:
        """Size of the features of one image [bytes]."""
        size = self._num_image_tokens * self._config.language.hidden_size
        return size * next(self._model.parameters()).dtype.itemsize

    @torch.inference_mode()
    def encode_images(self, pixel_values: np.ndarray) -> Tensor:
        """Return float[n, p, h], the embeddings at the placeholders of each image of uint8[n, 3, H, W]."""
        pixels = torch.from_numpy(pixel_values)
        hidden_size, tokens = self._config.language.hidden_size, self._num_image_tokens
        encoded = [
            self._model.encode_images(chunk.to(self._device), chunk.size(0)).view(-1, tokens, hidden_size)
            for chunk in pixels.split(IMAGES_PER_BATCH)
            if chunk.size(0)
        ]
        empty = torch.empty((0, tokens, hidden_size), device=self._device)
        return torch.cat(encoded) if encoded else empty

    def generate(self, prompts: Sequence[Prompt], features: Tensor, options: SamplingOptions) -> Iterator[Answer]:
        """Answer prompts; prompts of one length are answered together. An answer ends at the model's last position.

        Args:
            prompts: in any order, each shorter than max_position_embeddings.
            features: float[n, p, h] of all images, from `encode_images`.
            options: how tokens are chosen.

        Yields:
            One answer for each prompt, in any order.
        """
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            alike[len(prompt.input_ids), self._shared_length(prompt)].append(number)
        for (length, _), numbers in sorted(alike.items()):
            rows = max(1, self._positions_per_batch // length)
            for start in range(0, len(numbers), rows):
                chosen = numbers[start : start + rows]
                yield from self._answer([prompts[number] for number in chosen], chosen, features, options)

    @torch.inference_mode()
    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], features: Tensor, options: SamplingOptions
    ) -> list[Answer]:
        """Answer prompts of one length and prefix length."""
        left = self._config.language.max_position_embeddings - len(prompts[0].input_ids)
        options = replace(options, max_new_tokens=min(options.max_new_tokens, left))
        uniforms = torch.stack([draw_uniforms(options, number) for number in numbers])
        context, inputs = self._begin(prompts, features, options.max_new_tokens)
        ids: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for step in range(options.max_new_tokens):
            logits = self._forward(inputs, context)
            tokens = choose_tokens(logits, options, uniforms[active, step]).tolist()
            still = []
            for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
                if token not in self._stop_ids:
                    ids[row].append(token)
                    still.append(place)
            if not still:
                break
            if len(still) < len(active):
                _choose_rows(context, still)
            active = [active[place] for place in still]
            inputs = _Inputs(self._embed_tokens(torch.tensor([[ids[row][-1]] for row in active])))
        return [Answer(number, ids[row]) for row, number in enumerate(numbers)]

    def _begin(
        self, prompts: Sequence[Prompt], features: Tensor, max_new_tokens: int
    ) -> tuple[StaticInferenceContext, "_Inputs"]:
        """Return a cache and the next input.

        Prompts about the same images begin alike. The model processes each such beginning once, and the prompts
        continue from copies of its cache.
        """
        length, cut = len(prompts[0].input_ids), self._shared_length(prompts[0])
        context = StaticInferenceContext(len(prompts), length + max_new_tokens)
        owners: dict[tuple[bytes, tuple[int, ...]], int] = {}
        rows = [owners.setdefault((p.input_ids[:cut].tobytes(), p.images), len(owners)) for p in prompts]
        if not cut or len(owners) == len(prompts):
            return context, self._embed(prompts, features)
        beginnings = [Prompt(np.frombuffer(ids, dtype=np.int64), images) for ids, images in owners]
        begun = StaticInferenceContext(len(beginnings), cut)
        self._forward(self._embed(beginnings, features), begun)
        _choose_rows(begun, rows)
        for layer, caches in begun.key_value_memory_dict.items():
            context.key_value_memory_dict[layer] = tuple(
                _lengthened(cache, length + max_new_tokens) for cache in caches
            )
        context.increment_sequence_len_offset(cut)
        rest = [Prompt(prompt.input_ids[cut:], ()) for prompt in prompts]
        return context, self._embed(rest, features)

    def _shared_length(self, prompt: Prompt) -> int:
        """Return how many positions, up to the last image, may be shared with other prompts."""
        if not self._can_continue:
            return 0
        placeholders = np.flatnonzero(prompt.input_ids == self._config.language.image_token_id)
        # At least one position must be left to process.
        return min(int(placeholders[-1]) + 1, len(prompt.input_ids) - 1) if len(placeholders) else 0

    def _embed(self, prompts: Sequence[Prompt], features: Tensor) -> "_Inputs":
        """Return the input of prompts of one length."""
        input_ids = torch.from_numpy(np.stack([prompt.input_ids for prompt in prompts]))
        text = self._embed_tokens(input_ids)
        images = [image for prompt in prompts for image in prompt.images]
        if not images:
            return _Inputs(text)
        # Placeholders row by row, in reading order; the embeddings lie position by position.
        row, position = (input_ids == self._config.language.image_token_id).nonzero(as_tuple=True)
        index = (position * len(prompts) + row).to(self._device)
        chosen = features.index_select(0, torch.tensor(images, device=features.device))
        return _Inputs(merge_image_embeddings(text, chosen.flatten(0, 1).to(self._device), index), index)

    def _embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return float[s, b, h] of int64[b, s]."""
        return self._model.language_model.embedding(input_ids=input_ids.to(self._device), position_ids=None)

    def _forward(self, inputs: "_Inputs", context: StaticInferenceContext) -> Tensor:
        """Return float[b, vocab_size] logits of the last position, and advance the cache."""
        logits = self._model.language_model(
            inputs.hidden, image_token_index=inputs.image_token_index, inference_context=context
        )
        context.increment_sequence_len_offset(inputs.hidden.size(0))
        context.enable_decode_mode()
        return logits[:, -1]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the decoder processes next."""

    hidden: Tensor
    """float[s, b, h]."""
    image_token_index: Tensor | None = None
    """int64[k]; image positions in the flattened sequence [s * b]; None for no images."""


def _choose_rows(context: StaticInferenceContext, rows: Sequence[int]) -> None:
    """Reduce or reorder the cache to these rows, in this order."""
    for layer, caches in context.key_value_memory_dict.items():
        index = torch.tensor(rows, device=caches[0].device)
        context.key_value_memory_dict[layer] = tuple(cache.index_select(1, index) for cache in caches)


def _lengthened(cache: Tensor, length: int) -> Tensor:
    """Return float[length, b, g, d] that begins with `cache`."""
    longer = cache.new_empty((length, *cache.shape[1:]))
    longer[: cache.size(0)] = cache
    return longer
