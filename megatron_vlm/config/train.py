"""A training run: one stage, its parallel layout, its optimizer and its checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vlm.config.blend import MAX_EPOCHS, steps_of
from megatron_vlm.config.checks import check_at_most, check_not_negative, check_path, check_positive
from megatron_vlm.config.data import DataConfig
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.hooks import HookSettings
from megatron_vlm.config.learning import learning_of
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.objectives import Objective
from megatron_vlm.config.objectives.language_modelling import Config as LanguageModelling
from megatron_vlm.config.patterns import adapter_names, check_patterns, parameter_sizes
from megatron_vlm.config.pipeline import Spelling, check_layout, count_chunks, count_layers, place_layers
from megatron_vlm.config.supervision import SupervisionConfig

_MIN_TIMEOUT, _MAX_TIMEOUT = 0.01, 100_000.0
"""Of collectives [minutes]."""
_MAX_THREADS = 4096
_MAX_BATCH = 2**20
_MAX_ROWS = 2**31
"""Most rows of a run; each has its place in the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is distributed over ranks; data parallelism uses the remaining factor of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); a layout says it by itself."""
    context_parallel_size: int = 1
    """Ranks that share the positions of every row; keys and values are gathered for attention."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions along the sequence."""
    vision_tensor_parallel: bool = False
    """Split heads and MLPs of the tower over the tensor-parallel ranks, which then encode the same images; otherwise
    each of them has the whole tower and encodes its share. The projection is whole on every rank either way."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Decoder layers on the stage that also holds the vision tower; None for an even split."""
    pipeline_model_parallel_layout: Spelling | None = None
    """What each model chunk holds, spelled as in megatron-core: `Et*3|t*4|t*3L` is 3, 4 and 3 decoder layers; E is the
    embedding with tower and projection, L final norm and output layer. Chunks go round the stages: with 2 stages,
    `Et|t*2|t|L` is a virtual pipeline. Or a list of `embedding`, `decoder` and `loss` for each chunk."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = None
    """Parameters whose gradients are reduced together, and weights gathered together, where overlap_grad_reduce is on;
    None for 40 million, or 1 million for each data-parallel rank if that is more. Pipeline stages after the first, and
    model chunks after the first of a rank, reduce and gather all at once."""
    overlap_p2p_comm: bool = False
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        check_positive("parallel", self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        check_positive("parallel", self, "context_parallel_size")
        check_positive("parallel", self, "virtual_pipeline_model_parallel_size", "distributed_timeout_minutes")
        check_positive("parallel", self, "ddp_bucket_size")
        if not _MIN_TIMEOUT <= self.distributed_timeout_minutes <= _MAX_TIMEOUT:
            raise ConfigError(
                f"parallel.distributed_timeout_minutes={self.distributed_timeout_minutes} is not between "
                f"{_MIN_TIMEOUT} and {_MAX_TIMEOUT}",
                fix="use minutes, such as 10",
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel needs tensor_model_parallel_size > 1", fix="turn it off, or raise the size"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ConfigError(
                "parallel.overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
                fix="turn both on",
            )
        if self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            raise ConfigError(
                "parallel.ddp_bucket_size needs overlap_grad_reduce", fix="turn it on, or remove the size"
            )
        self._check_layout()
        self._check_virtual_pipeline()

    @property
    def num_model_chunks(self) -> int | None:
        """Model chunks per pipeline rank, as set or as the layout has them; None without a virtual pipeline."""
        if self.pipeline_model_parallel_layout is None:
            return self.virtual_pipeline_model_parallel_size
        return count_chunks(self.pipeline_model_parallel_layout, self.pipeline_model_parallel_size)

    def chunk_layers(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Return the decoder layers, counted from 0, of each stage's model chunks in order.

        Args:
            num_layers: of the whole decoder; `derive_layout` checks that they fit.
        """
        pp, first = self.pipeline_model_parallel_size, self.num_layers_in_first_pipeline_stage
        if self.pipeline_model_parallel_layout is not None:
            counts = count_layers(self.pipeline_model_parallel_layout)
        elif first is not None:
            counts = (first, *[(num_layers - first) // (pp - 1)] * (pp - 1))
        else:
            num_chunks = pp * (self.num_model_chunks or 1)
            counts = (num_layers // num_chunks,) * num_chunks
        return place_layers(counts, pp)

    @property
    def num_image_shares(self) -> int:
        """Ranks with the same rows among which the images of a micro-batch are divided."""
        return self.context_parallel_size * (1 if self.vision_tensor_parallel else self.tensor_model_parallel_size)

    @property
    def tower_parallel_size(self) -> int:
        """Ranks over which the tower is split."""
        return self.tensor_model_parallel_size if self.vision_tensor_parallel else 1

    def describe(self, data_parallel_size: int) -> str:
        """Return the sizes in a few words, such as `TP 4 x PP 2 x DP 8`."""
        sizes = [("TP", self.tensor_model_parallel_size), ("PP", self.pipeline_model_parallel_size)]
        if self.context_parallel_size > 1:
            sizes.append(("CP", self.context_parallel_size))
        return " x ".join(f"{name} {size}" for name, size in (*sizes, ("DP", data_parallel_size)))

    def _check_layout(self) -> None:
        layout = self.pipeline_model_parallel_layout
        if layout is None:
            return
        check_layout(layout, self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size)
        if self.num_layers_in_first_pipeline_stage is not None:
            raise ConfigError(
                "parallel.pipeline_model_parallel_layout and num_layers_in_first_pipeline_stage are both set",
                fix="remove one of them",
            )

    def _check_virtual_pipeline(self) -> None:
        if self.num_model_chunks is None:
            if self.overlap_p2p_comm:
                raise ConfigError(
                    "parallel.overlap_p2p_comm needs virtual_pipeline_model_parallel_size or such a layout",
                    fix="turn it off",
                )
            return
        if self.pipeline_model_parallel_size == 1:
            raise ConfigError("parallel.virtual_pipeline_model_parallel_size needs a pipeline", fix="remove it")
        if self.pipeline_model_parallel_size == 2 and not self.overlap_p2p_comm:
            # Measured: two sends between the same two ranks in one batch are swapped, and the gradients are wrong.
            raise ConfigError(
                "a virtual pipeline over 2 stages without overlap_p2p_comm computes wrong gradients in megatron-core",
                fix="set parallel.overlap_p2p_comm=true",
            )
        if self.num_layers_in_first_pipeline_stage is not None:
            raise ConfigError(
                "parallel.num_layers_in_first_pipeline_stage cannot be combined with a virtual pipeline",
                fix="remove one of them",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_fraction: float = 0.03
    """Fraction of train_iters over which the rate rises linearly from 0; ignored if lr_warmup_iters is set."""
    lr_warmup_iters: int | None = None
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate by pattern of parameters (see `training.freeze`); the last pattern that matches a
    parameter counts."""
    weight_decay: float = 0.0
    no_weight_decay: tuple[str, ...] = ()
    """Patterns of parameters without weight decay, beside norms, biases and all others of one dimension, and what the
    tower names: its position embeddings and class token."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Maximum gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_not_negative("optimizer", self, "lr", "min_lr", "lr_warmup_fraction", "lr_warmup_iters")
        check_not_negative("optimizer", self, "weight_decay", "clip_grad", "adam_beta1", "adam_beta2")
        check_positive("optimizer", self, "adam_eps")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} is not below 1", fix="use a number below 1")
        check_at_most("optimizer", self, 1, "lr_warmup_fraction")
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optimizer.min_lr={self.min_lr} is above optimizer.lr={self.lr}", fix="lower one or raise the other"
            )
        for pattern, factor in self.lr_multipliers.items():
            if factor <= 0:
                raise ConfigError(
                    f"optimizer.lr_multipliers: {factor} for {pattern!r} is not positive",
                    fix="name what shall not learn in training.freeze",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    global_batch_size: int
    """Rows per optimizer step over all ranks."""
    micro_batch_size: int = 1
    """Rows per forward pass and data-parallel rank."""
    train_iters: int | None = None
    """Optimizer steps; None if train_epochs determines them."""
    train_epochs: float | None = None
    """Passes over the blend, if train_iters is None."""
    exit_iteration: int | None = None
    """Save a checkpoint and stop after this iteration; the learning-rate schedule still spans train_iters."""
    exit_duration_minutes: float | None = None
    """Save a checkpoint and stop with exit code 75, as after SIGTERM, once a rank has run so long, its start included;
    for clusters that end a job without a signal."""
    freeze: tuple[str, ...] = ()
    """Parts and parameters that do not learn in this stage: patterns of `config/patterns.py`, such as `vision_model` or
    `language_model.decoder.layers.[0-3]`. The weights of an adapter always learn."""
    precision: Literal["fp32", "bf16"] = "bf16"
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Format of the decoder's FP8 matrix products; needs transformer-engine and a GPU with FP8."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 tensors are scaled, in megatron-core's words. Only `delayed` keeps state between steps, which
    transformer-engine pickles into checkpoints; `blockwise` needs compute capability 9.0, `mxfp8` 10.0."""
    num_layers_at_start_in_bf16: int = 0
    """First decoder layers that stay in bf16 under FP8."""
    num_layers_at_end_in_bf16: int = 0
    """Last decoder layers that stay in bf16 under FP8."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations to recompute in the backward pass; selective recomputes only the attention core."""
    validation_interval: int | None = None
    """Iterations between measurements of the validation loss; it is also measured after the last iteration."""
    validation_iters: int | None = None
    """Global batches per validation; None for one pass over `data.validation`."""
    objective: Objective = field(default_factory=LanguageModelling)
    """What is minimised."""
    hooks: tuple[HookSettings, ...] = ()
    """What runs beside the steps, in addition to logs, metrics, TensorBoard and checkpoints."""
    seed: int = 1234
    deterministic: bool = False
    """Choose algorithms that give the same bits in every run on a GPU, and fail where there is none; slower."""
    log_interval: int = 1
    spike_sigmas: float | None = 6.0
    """A loss or gradient norm is a spike if it is above the mean of those of the last `spike_window` iterations by more
    than this many of their standard deviations, of which one counts as at least 1 % of the mean. Spikes are logged, and
    recorded with their sample ids in `events.jsonl`; nothing else follows. None: none is looked for."""
    spike_window: int = 200
    """Iterations that are looked back at for spikes; the first 20 of a run, or as many as this if less, have none."""
    num_threads: int | None = None
    """CPU threads per rank; None divides the cores of the machine by its ranks."""

    def __post_init__(self) -> None:
        check_positive("training", self, "global_batch_size", "micro_batch_size", "train_iters", "train_epochs")
        check_positive("training", self, "log_interval", "num_threads", "exit_iteration", "exit_duration_minutes")
        check_positive("training", self, "spike_sigmas", "spike_window")
        check_positive("training", self, "validation_interval", "validation_iters")
        check_not_negative("training", self, "seed")
        check_at_most("training", self, MAX_EPOCHS, "train_epochs")
        check_at_most("training", self, _MAX_THREADS, "num_threads")
        check_at_most("training", self, _MAX_ROWS, "train_iters", "validation_iters")
        check_at_most("training", self, _MAX_BATCH, "global_batch_size", "micro_batch_size")
        if self.train_iters is not None and self.train_iters * self.global_batch_size > _MAX_ROWS:
            raise ConfigError(
                f"training.train_iters={self.train_iters} of training.global_batch_size={self.global_batch_size} are "
                f"above {_MAX_ROWS} rows",
                fix="lower one of them",
            )
        if (self.train_iters is None) == (self.train_epochs is None):
            raise ConfigError(
                "exactly one of training.train_iters and training.train_epochs must be set", fix="set one"
            )
        self._check_layers_in_bf16()

    def _check_layers_in_bf16(self) -> None:
        names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        check_not_negative("training", self, *names)
        for name in names:
            if not getattr(self, name):
                continue
            if self.fp8 is None:
                raise ConfigError(f"training.{name} needs training.fp8", fix="remove it, or set training.fp8")
            if self.fp8_recipe == "delayed":
                raise ConfigError(
                    f"training.{name} cannot be combined with training.fp8_recipe=delayed",
                    fix="use the recipe tensorwise, or remove it",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Which weights to start from, when to save, and how many checkpoints to keep."""

    load_weights: str | None = None
    """Run folder or checkpoint to take the initial weights from; ignored once the run has a checkpoint of its own."""
    save_interval: int = 500
    """Iterations between checkpoints; the last iteration is always saved."""
    keep_last: int = 2
    """Number of checkpoints to keep; 0 keeps all."""
    async_save: bool = False
    """Copy what is saved and write the copy while the run goes on; takes as much host memory as a rank writes. The save
    at the end of a run is waited for."""
    max_failed_saves: int = 3
    """Failed saves in a row that end the run. After a failure, the next try comes a tenth of `save_interval` later, or
    at once where the run is about to end."""

    def __post_init__(self) -> None:
        check_positive("checkpoint", self, "save_interval", "max_failed_saves")
        check_not_negative("checkpoint", self, "keep_last")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All settings of a training run."""

    stage: Literal["align", "pretrain", "sft"]
    run_dir: str
    """Folder of the run; training resumes from the newest checkpoint in it."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)

    def __post_init__(self) -> None:
        check_path("run_dir", self.run_dir)
        check_path("checkpoint.load_weights", self.checkpoint.load_weights)
        self._check_patterns()
        if len(steps_of(self.data.blend)) > 1 and self.training.train_iters is None:
            raise ConfigError(
                "data.blend changes during the run, so that training.train_epochs has no meaning",
                fix="set training.train_iters instead",
            )
        if bool(self.data.validation) != (self.training.validation_interval is not None):
            raise ConfigError(
                "only one of data.validation and training.validation_interval is set", fix="set both or neither"
            )

    def check_start(self) -> None:
        """Check that a run that has no checkpoint yet can save one.

        Raises:
            ConfigError: there is an adapter and no checkpoint to start from, which holds the weights that do not learn.
        """
        if self.model.adapter is not None and self.checkpoint.load_weights is None:
            raise ConfigError(
                f"adapter {self.model.adapter.type} needs a model to adapt, and checkpoint.load_weights is not set",
                where="model.adapter",
                fix="set it to a run folder or checkpoint",
            )

    def _check_patterns(self) -> None:
        names, optimizer = tuple(parameter_sizes(self.model)), self.optimizer
        check_patterns("training.freeze", self.training.freeze, names)
        names_with_adapter = (*names, *adapter_names(self.model))
        check_patterns("optimizer.lr_multipliers", tuple(optimizer.lr_multipliers), names_with_adapter)
        check_patterns("optimizer.no_weight_decay", optimizer.no_weight_decay, names_with_adapter)
        if self.model.adapter is None and not learning_of(self.model, self.training.freeze).anything:
            raise ConfigError(
                "training.freeze matches every parameter and model.adapter is not set, so nothing would learn",
                fix="leave one part out",
            )
