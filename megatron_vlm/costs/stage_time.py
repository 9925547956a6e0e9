"""Time of one micro-batch on a rank of a pipeline stage, by what it is spent on."""

from collections import Counter
from dataclasses import astuple, dataclass, fields

from megatron_vlm.config import TrainConfig
from megatron_vlm.config.learning import learning_of
from megatron_vlm.costs.cluster import LATENCY, Cluster
from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.parameters import stage_layers, stage_sizes

_BF16 = 2
# Numbers that a layer reads and writes for each element of its input: two norms and two residual additions.
_RESIDUAL_FORWARD, _RESIDUAL_BACKWARD = 10, 12
# Likewise per element of queries and keys (rotary embeddings), and of the MLP's inner width (a fused SwiGLU).
_ROTARY, _SWIGLU_FORWARD, _SWIGLU_BACKWARD = 2, 3, 5
# Passes over the logits in FP32 and BF16: maximum, exponentials, sum, quotient, and back [bytes].
_LOSS_BYTES = 36
_MAIN_GRADIENT_BYTES = 8  # each micro-batch reads and writes the FP32 gradient
_FLASH_BACKWARD = 2.5  # five products for the two of the forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds by what they are spent on."""

    products: float = 0.0
    """Matrix products of decoder layers and output layer."""
    attention: float = 0.0
    memory: float = 0.0
    """What the bandwidth of the memory limits: norms, activations, residuals, the loss, sums of gradients."""
    tower: float = 0.0
    """Vision tower and projection."""
    tensor_parallel: float = 0.0
    """Exchanges between tensor-parallel ranks that no computation hides, and of image features."""
    context_parallel: float = 0.0
    """Exchanges of keys and values between context-parallel ranks, which nothing hides."""
    pipeline_parallel: float = 0.0
    """Messages between stages that no computation hides."""

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(astuple(self))

    def __add__(self, other: "Times") -> "Times":
        return Times(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def times(self, count: float) -> "Times":
        """Return `count` times this."""
        return Times(**{field.name: count * getattr(self, field.name) for field in fields(self)})


def micro_batch_times(
    config: TrainConfig, stage: int, work: Work, cluster: Cluster, world_size: int
) -> tuple[Times, Times]:
    """Return the times of the forward and of the backward pass of one micro-batch, recomputation included.

    Args:
        config: settings of the run.
        stage: pipeline stage, from 0.
        work: contents of the micro-batch; its positions are those of full rows, padding included.
        cluster: where it runs.
        world_size: ranks of the job.
    """
    size, pp = stage_sizes(config)[stage], config.parallel.pipeline_model_parallel_size
    mine = work.times(1 / config.parallel.context_parallel_size)
    forward, backward = _decoder(config, stage, mine, cluster)
    backward += Times(memory=cluster.memory_seconds(_MAIN_GRADIENT_BYTES * size.learning))
    parts = [_adapter(config, stage, work, cluster)]
    if stage == 0:
        parts.append(_vision(config, work, cluster))
    if stage == pp - 1:
        parts.append(_output(config, mine, cluster))
    for part in parts:
        forward, backward = forward + part[0], backward + part[1]
    if pp == 1:
        return forward, backward
    stride = world_size // pp
    return (
        forward + _messages(config, cluster, forward.total, stride),
        backward + _messages(config, cluster, backward.total, stride),
    )


def _positions(config: TrainConfig) -> int:
    """Return the positions of a micro-batch on one rank."""
    return config.training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size


def _decoder(config: TrainConfig, stage: int, work: Work, cluster: Cluster) -> tuple[Times, Times]:
    """Return the times of the layers of a stage."""
    learning = learning_of(config.model, config.training.freeze)
    layers = [learning.layers[layer] for layer in stage_layers(config.model, config.parallel)[stage]]
    forward = backward = Times()
    for (matrices, keeps), count in Counter((layer.matrices, layer.keeps) for layer in layers).items():
        times = _layer(config, matrices, work, cluster)
        forward += times[0].times(count)
        backward += times[1].times(count if keeps else 0)
    return forward, backward


def _layer(config: TrainConfig, learning: tuple[bool, ...], work: Work, cluster: Cluster) -> tuple[Times, Times]:
    """Return the times of one layer; `learning` says which of its matrices learn."""
    language, parallel, training = config.model.language, config.parallel, config.training
    tp, positions, (query, key_value) = (
        parallel.tensor_model_parallel_size,
        _positions(config),
        language.attention_sizes,
    )
    matrices = language.layer_matrices(tp)
    products = sum(cluster.product_seconds(positions, inputs, outputs) for inputs, outputs in matrices)
    weight_gradients = sum(
        cluster.product_seconds(inputs, positions, outputs)
        for (inputs, outputs), learns in zip(matrices, learning, strict=True)
        if learns
    )
    attention = cluster.attention_seconds(language.layer_operations(0, work.attention_pairs).attention / tp)
    between = positions * language.hidden_size / (tp if parallel.sequence_parallel else 1)
    rotary, mlp = positions * (query + key_value) / tp * _ROTARY, positions * language.ffn_hidden_size / tp
    forward = Times(
        products=products,
        attention=attention,
        memory=cluster.memory_seconds(_BF16 * (between * _RESIDUAL_FORWARD + rotary + mlp * _SWIGLU_FORWARD)),
        tensor_parallel=4 * _exchange(config, cluster),
        context_parallel=_exchange_of_keys(config, cluster),
    )
    backward = Times(
        products=products + weight_gradients,
        attention=_FLASH_BACKWARD * attention,
        memory=cluster.memory_seconds(_BF16 * (between * _RESIDUAL_BACKWARD + rotary + mlp * _SWIGLU_BACKWARD)),
        # The other half runs while the gradients of the weights are computed.
        tensor_parallel=(2 if any(learning) else 4) * _exchange(config, cluster),
        # Keys and values are gathered again, and their gradients summed.
        context_parallel=2 * _exchange_of_keys(config, cluster),
    )
    if training.recompute == "full":
        backward += forward
    elif training.recompute == "selective":
        backward += Times(attention=attention, context_parallel=forward.context_parallel)
    return forward, backward


def _exchange(config: TrainConfig, cluster: Cluster) -> float:
    """Return the time to gather or to reduce and scatter the hidden states of a micro-batch.

    Without sequence parallelism both happen at once, in an all-reduce of the same length.
    """
    size = _BF16 * _positions(config) * config.model.language.hidden_size
    return cluster.exchange_seconds(size, config.parallel.tensor_model_parallel_size, stride=1)


def _exchange_of_keys(config: TrainConfig, cluster: Cluster) -> float:
    """Return the time to gather the keys and values of a layer from the context-parallel ranks."""
    parallel, (_, key_value) = config.parallel, config.model.language.attention_sizes
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    return cluster.exchange_seconds(_BF16 * cp * _positions(config) * 2 * key_value / tp, cp, stride=tp)


def _vision(config: TrainConfig, work: Work, cluster: Cluster) -> tuple[Times, Times]:
    """Return the times of tower and projection; each rank with the same rows encodes a share of the images.

    A rank computes its part of a split tower, adds up its outputs with the others, and then the whole projection.
    """
    model, ranks, split = config.model, config.parallel.num_image_shares, config.parallel.tower_parallel_size
    patches, share = model.fixed_patches("the prediction of step times"), -(-work.num_images // ranks)
    adapted = model.adapter.parts if model.adapter is not None else ()
    sizes = model.vision.feature_size, model.language.hidden_size
    tower, projection = model.vision.operations(patches).times(1 / split), model.projection.operations(patches, *sizes)
    tower_learns, projection_learns, _ = learning_of(model, config.training.freeze).parts
    flows = tower_learns or "vision_model" in adapted
    training = tower.training(learns=tower_learns, input_gradient=False, has_adapter=flows) + projection.training(
        learns=projection_learns, input_gradient=flows, has_adapter="vision_projection" in adapted
    )
    forward, again = tower.forward + projection.forward, 0.0
    if flows and config.training.recompute == "full":
        again = tower.forward
    embeddings = _BF16 * share * ranks * model.projection.token_grid(patches).size * model.language.hidden_size
    gather = cluster.exchange_seconds(embeddings, ranks, stride=split)
    # An all-reduce takes as long as a reduce-scatter and a gather.
    added = 2 * cluster.exchange_seconds(_BF16 * share * model.vision.summed_numbers(patches), split, stride=1)
    return (
        Times(tower=cluster.tower_seconds(share * forward), tensor_parallel=gather + added if share else 0.0),
        Times(
            tower=cluster.tower_seconds(share * (training - forward + again)),
            tensor_parallel=added * (flows + bool(again)) if share else 0.0,
        ),
    )


def _output(config: TrainConfig, work: Work, cluster: Cluster) -> tuple[Times, Times]:
    """Return the times of the output layer and the loss."""
    language, parallel = config.model.language, config.parallel
    rows = language.padded_vocab_size // parallel.tensor_model_parallel_size
    product = cluster.product_seconds(work.num_labels, language.hidden_size, rows)
    learns = learning_of(config.model, config.training.freeze).output
    memory = cluster.memory_seconds(_LOSS_BYTES / 2 * work.num_labels * rows)
    exchange = _exchange(config, cluster)
    return (
        Times(products=product, memory=memory, tensor_parallel=exchange),
        Times(products=(2 if learns else 1) * product, memory=memory, tensor_parallel=exchange),
    )


def _adapter(config: TrainConfig, stage: int, work: Work, cluster: Cluster) -> tuple[Times, Times]:
    """Return the times of the adapter, at the rate of narrow products."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    if model.adapter is None:
        return Times(), Times()
    patches = model.fixed_patches("the prediction of step times")
    image_tokens = work.num_images * model.projection.token_grid(patches).size / config.parallel.context_parallel_size
    share = -(-work.num_images // config.parallel.num_image_shares)
    layers = stage_sizes(config)[stage].num_layers / model.language.num_layers / tp
    forward = backward = 0.0
    for part in model.adapter.parts:
        if part == "language_model":
            added = model.adapter.operations(model, part, _positions(config), image_tokens).times(layers)
        elif stage == 0:
            added = model.adapter.operations(model, part, share * patches.size, image_tokens)
        else:
            continue
        forward += added.forward
        backward += added.training(learns=True, input_gradient=True) - added.forward
    return Times(products=cluster.tower_seconds(forward)), Times(products=cluster.tower_seconds(backward))


def _messages(config: TrainConfig, cluster: Cluster, seconds: float, stride: int) -> Times:
    """Return the waits for messages between two stages during a pass that takes so many seconds.

    Overlapped, a message is on its way while the next model chunk computes.
    """
    parallel = config.parallel
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    size = _BF16 * _positions(config) * config.model.language.hidden_size / split
    chunks = parallel.num_model_chunks or 1
    wait = cluster.message_seconds(size, stride=stride)
    if parallel.overlap_p2p_comm:
        wait = max(LATENCY, wait - seconds / chunks)
    return Times(pipeline_parallel=chunks * wait)
