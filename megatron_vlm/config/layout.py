"""The layout of a job: what follows from the settings and the number of ranks."""

import math
from dataclasses import dataclass

from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.train import TrainConfig

# Required by the matrix products of the backward pass: megatron-core's fp8_utils.get_fp8_align_size. Reported for
# sequence parallelism in NVIDIA-NeMo/RL issue 1551.
_FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks and batch sizes of one job."""

    world_size: int
    data_parallel_size: int
    num_micro_batches: int
    """Forward passes of each data-parallel rank per step."""
    tokens_per_micro_batch: int
    """Positions per forward pass, including padding; the maximum if rows differ in length [tokens]."""


def derive_layout(config: TrainConfig, world_size: int) -> Layout:
    """Check that the settings fit `world_size` ranks and return the layout.

    Raises:
        ConfigError: one size does not divide another; names the settings and the nearest value that fits.
    """
    parallel, training, language = config.parallel, config.training, config.model.language
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        names, sizes = "parallel.tensor_model_parallel_size * pipeline_model_parallel_size", f"{tp} * {pp}"
        if cp > 1:
            names, sizes = f"{names} * context_parallel_size", f"{sizes} * {cp}"
        raise ConfigError(
            f"{world_size} ranks are not a multiple of {names} = {sizes}",
            fix=f"start {-(-world_size // (tp * pp * cp)) * tp * pp * cp} ranks, or change the layout",
        )
    data_parallel_size = world_size // (tp * pp * cp)
    rows = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % rows:
        nearest = max(1, (training.global_batch_size + rows // 2) // rows) * rows
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of micro_batch_size * "
            f"data_parallel_size = {training.micro_batch_size} * {data_parallel_size}",
            fix=f"choose {nearest}, or change training.micro_batch_size",
        )
    _check_divides("model.language.num_attention_heads", language.num_attention_heads, "tensor parallel size", tp)
    _check_divides("model.language.ffn_hidden_size", language.ffn_hidden_size, "tensor parallel size", tp)
    if language.query_groups % tp and tp % language.query_groups:
        raise ConfigError(
            f"model.language.num_query_groups={language.query_groups} and tensor parallel size {tp} do not divide",
            fix="choose one as a multiple of the other",
        )
    if parallel.vision_tensor_parallel:
        config.model.vision.check_tensor_parallel(tp)
    _check_pipeline(config, pp)
    tokens = training.micro_batch_size * config.data.seq_length
    _check_tokens(config)
    num_micro_batches = training.global_batch_size // rows
    if parallel.num_model_chunks:
        _check_divides("the number of micro-batches", num_micro_batches, "pipeline size", pp)
    return Layout(
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        num_micro_batches=num_micro_batches,
        tokens_per_micro_batch=tokens,
    )


def _check_tokens(config: TrainConfig) -> None:
    """Check that the positions of a micro-batch divide evenly for every possible row length."""
    rows, names = config.training.micro_batch_size, {"seq_length": config.data.seq_length}
    if config.data.length_clustering:
        names["length_multiple"] = config.data.length_multiple
    for name, length in names.items():
        for by_name, by in _position_multiples(config).items():
            _check_divides(f"micro_batch_size * {name}", rows * length, by_name, by)


def _position_multiples(config: TrainConfig) -> dict[str, int]:
    """Return what the positions of a micro-batch must be a multiple of, under the name of what asks for it."""
    parallel, training = config.parallel, config.training
    context, multiples = parallel.context_parallel_size, {}
    ranks = context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    if context > 1:
        multiples["2 * context parallel size"] = 2 * context  # see `parallel.slicing.ContextShare`
    if parallel.sequence_parallel:
        multiples["tensor parallel size" if context == 1 else "tensor * context parallel size"] = ranks
    if training.fp8 is not None:
        multiple = _FP8_MULTIPLES[training.fp8_recipe]
        multiples[f"{multiple} tokens a rank for FP8"] = multiple * ranks
    return multiples


def position_multiple(config: TrainConfig) -> int | None:
    """Return the multiple that a micro-batch is filled up to if positions behind the last sample of a row are left out.

    Returns:
        None if every row keeps all its positions: the stages of a pipeline exchange activations of one length.
    """
    if config.parallel.pipeline_model_parallel_size > 1:
        return None
    return math.lcm(*_position_multiples(config).values(), config.data.sample_multiple)


def _check_pipeline(config: TrainConfig, pp: int) -> None:
    layers, first = config.model.language.num_layers, config.parallel.num_layers_in_first_pipeline_stage
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(config.training, name) > layers // pp:
            raise ConfigError(
                f"training.{name}={getattr(config.training, name)} is more than the {layers // pp} layers of a stage",
                fix="choose a smaller number",
            )
    if config.parallel.pipeline_model_parallel_layout is not None:
        _check_layers(config.parallel.chunk_layers(layers), layers)
        return
    if first is None:
        chunks = pp * (config.parallel.num_model_chunks or 1)
        _check_divides("model.language.num_layers", layers, "number of pipeline chunks", chunks)
        return
    if pp == 1 or not 0 < first < layers:
        raise ConfigError(
            f"parallel.num_layers_in_first_pipeline_stage={first} does not fit {layers} layers over {pp} stages",
            fix="leave at least one layer for every stage",
        )
    _check_divides("the layers after the first stage", layers - first, "stages after it", pp - 1)


def _check_layers(placed: tuple[tuple[range, ...], ...], layers: int) -> None:
    found = sum(len(chunk) for stage in placed for chunk in stage)
    if found != layers:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_layout has {found} decoder layers, model.language.num_layers={layers}",
            fix=f"let it have {layers}",
        )


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"{name} ({value}) is not a multiple of {by_name} ({by})", fix="change one of them")
