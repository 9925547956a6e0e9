"""Activations of a pipeline stage, put together from those of its parts."""

from collections import Counter
from typing import Literal

from megatron_vlm.config import PART_NAMES, ParallelConfig, TrainConfig
from megatron_vlm.config.activations import Activations
from megatron_vlm.config.language import TensorSplit
from megatron_vlm.config.learning import learning_of
from megatron_vlm.costs.flops import Work

Backend = Literal["torch", "transformer_engine"]


def stage_activations(
    config: TrainConfig, stage: int, work: Work, backend: Backend, num_micro_batches: int = 1
) -> Activations:
    """Return the most that a rank of a pipeline stage keeps of all micro-batches in flight, and what it works on.

    Args:
        config: settings of the run.
        stage: pipeline stage, from 0.
        work: images and labels of a micro-batch.
        backend: layers of the decoder; torch's rotate queries and keys in place.
        num_micro_batches: of a step, for each data-parallel rank.

    Raises:
        ConfigError: the number of patches depends on the image size.
    """
    placed = config.parallel.chunk_layers(config.model.language.num_layers)[stage]
    is_last = stage == config.parallel.pipeline_model_parallel_size - 1
    chunks = []
    for number, layers in enumerate(placed):
        ends = {"is_first": stage == number == 0, "is_last": is_last and number == len(placed) - 1}
        chunks.append(_of_chunk(config, layers, work, backend, **ends))
    moments = chunks_in_flight(config.parallel, stage, num_micro_batches)
    return Activations(
        kept=max(sum(count * chunk.kept for count, chunk in zip(counts, chunks, strict=True)) for counts in moments),
        working=max(chunk.working for chunk in chunks),
    )


def _of_chunk(
    config: TrainConfig, layers: range, work: Work, backend: Backend, *, is_first: bool, is_last: bool
) -> Activations:
    """Return the activations of one micro-batch in a model chunk with these decoder layers."""
    # Context-parallel ranks share positions and images; labels are spread about evenly over the positions.
    mine = work.times(1 / config.parallel.context_parallel_size)
    parts = _decoder(config, layers, mine, backend)
    if is_first:
        parts += _vision(config, work.num_images) + _adapter_of_tower(config, work)
    if is_last:
        language, split = config.model.language, _split(config.parallel)
        keeps_input = learning_of(config.model, config.training.freeze).input_gradient_of_output
        parts.append(language.output_activations(_positions(config) * keeps_input, mine.num_labels, split))
    return Activations(
        kept=sum(part.kept for part in parts), working=max((part.working for part in parts), default=0.0)
    )


def chunks_in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> frozenset[tuple[int, ...]]:
    """Return of how many micro-batches each model chunk of a rank keeps activations, at the fullest moments of a step.

    These are the moments behind the last forward pass before the first backward pass, and behind each that follows.

    Source: Narayanan et al., arXiv:2104.04473, sections 2.2 and 2.3; megatron-core's `get_pp_rank_microbatches` has the
    same numbers, its `get_schedule_table` the same order.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.num_model_chunks or 1
    if chunks == 1:
        return frozenset({(min(pp - stage, num_micro_batches),)})
    played = min(num_micro_batches, 4 * pp)  # the order repeats itself with each group of `pp` micro-batches
    groups = [min(pp, played - first) for first in range(0, played, pp)]
    passes = [chunk for size in groups for chunk in range(chunks) for _ in range(size)]
    in_flight = min(2 * (pp - stage - 1) + (chunks - 1) * pp + 1, len(passes))
    counts = Counter(passes[:in_flight])
    moments = {tuple(counts[chunk] for chunk in range(chunks))}
    for done, started in zip(passes, passes[in_flight:], strict=False):
        counts[chunks - 1 - done] -= 1
        counts[started] += 1
        moments.add(tuple(counts[chunk] for chunk in range(chunks)))
    return frozenset(moments)


def _decoder(config: TrainConfig, placed: range, work: Work, backend: Backend) -> list[Activations]:
    """Return the activations of those of a chunk's layers through which a gradient flows."""
    language, split = config.model.language, _split(config.parallel)
    num_tokens, learning = _positions(config), learning_of(config.model, config.training.freeze)
    layers = [learning.layers[layer] for layer in placed]
    kinds = Counter(layer.matrices for layer in layers if layer.keeps)
    found, added = [], _adapter(config, PART_NAMES[-1], num_tokens, work, num_layers=1)
    for matrices, count in kinds.items():
        layer = language.layer_activations(num_tokens, split, learning=matrices, rotates_in_place=backend == "torch")
        working = max(layer.working, _attention_to_gathered(config))
        layer = Activations(kept=layer.kept + added.kept, working=working + added.working)
        # Selective recomputation saves nothing here: flash attention keeps no scores.
        if config.training.recompute == "full":
            found.append(layer.recomputed(count, num_tokens * language.hidden_size / split.sequence))
        else:
            found.append(layer.times(count))
    return found


def _attention_to_gathered(config: TrainConfig) -> float:
    """Return what the backward pass of attention works on where keys and values are those of all positions.

    Keys and values, or their gradients before and after they are added up by position, and those of queries and output.
    """
    context, (query, key_value) = config.parallel.context_parallel_size, config.model.language.attention_sizes
    if context == 1:
        return 0.0
    positions = _positions(config)
    # The later of a rank's two chunks sees what the earlier one sees once more: half a share, at most.
    seen = positions * (context + 0.5)
    return (4 * seen * key_value + 2 * positions * query) / config.parallel.tensor_model_parallel_size


def _positions(config: TrainConfig) -> int:
    """Return the positions of a micro-batch on one rank."""
    return config.training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size


def _split(parallel: ParallelConfig) -> TensorSplit:
    return TensorSplit(size=parallel.tensor_model_parallel_size, sequence_parallel=parallel.sequence_parallel)


def _vision(config: TrainConfig, num_images: float) -> list[Activations]:
    """Return the activations of tower and projection, and of the rows with the image embeddings."""
    model, split = config.model, _split(config.parallel)
    learning = learning_of(model, config.training.freeze)
    parallel, patches = config.parallel, model.fixed_patches("the estimate of activations")
    share = _image_share(parallel, num_images)
    adapted = model.adapter.parts if model.adapter is not None else ()
    tower_learns, projection_learns, _ = learning.parts
    found = []
    if tower_learns or "vision_model" in adapted:
        tower = model.vision.activations(
            patches,
            learns=tower_learns,
            recompute=config.training.recompute == "full",
            tensor_parallel_size=parallel.tower_parallel_size,
        )
        # Layers before the first that learns keep nothing.
        found.append(tower.times(share * (1 if "vision_model" in adapted else learning.shares[0])))
    if found or projection_learns or "vision_projection" in adapted:
        sizes = model.vision.feature_size, model.language.hidden_size
        found.append(model.projection.activations(patches, *sizes, learns=projection_learns).times(share))
    # Every rank keeps the embeddings of all images at its positions, and the whole row into which they were written:
    # its part of a sequence is a view. The decoder counts that part as its input.
    if not learning.layers[0].keeps:
        return found
    images = share * parallel.num_image_shares / parallel.context_parallel_size
    embeddings = images * model.projection.token_grid(patches).size
    rest_of_rows = _positions(config) * (1 - 1 / split.sequence)
    found.append(Activations(kept=(embeddings + rest_of_rows) * model.language.hidden_size))
    return found


def _image_share(parallel: ParallelConfig, num_images: float) -> float:
    """Return the images that a rank encodes, at most."""
    return -(-num_images // parallel.num_image_shares)


def _adapter_of_tower(config: TrainConfig, work: Work) -> list[Activations]:
    model = config.model
    share = _image_share(config.parallel, work.num_images) * model.fixed_patches("the estimate of activations").size
    return [
        _adapter(config, part, share, work, num_layers=0)
        for part in PART_NAMES[:-1]
        if model.adapter is not None and part in model.adapter.parts
    ]


def _adapter(config: TrainConfig, part: str, num_positions: float, work: Work, *, num_layers: int) -> Activations:
    """Return what the adapter of a part adds, with `num_layers` decoder layers."""
    model = config.model
    if model.adapter is None or part not in model.adapter.parts:
        return Activations()
    return model.adapter.activations(
        model,
        part,
        num_positions,
        work.num_images * model.fixed_image_tokens("the estimate of activations"),
        num_layers=num_layers,
        tensor_parallel_size=config.parallel.tensor_model_parallel_size,
    )
