"""The state of a run between two steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlm.checkpoint.manifest import Base
from megatron_vlm.config import Layout, TrainConfig
from megatron_vlm.data.loading.quarantine import Quarantine
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.groups import RankLayout
from megatron_vlm.parallel.slicing import RankSlice
from megatron_vlm.platform.files.metrics import PastRecords
from megatron_vlm.training.bad_samples import BadSamples
from megatron_vlm.training.goodput import Goodput
from megatron_vlm.training.objective import Objective
from megatron_vlm.training.seen import Seen

SIGNALLED = "signalled"
EXIT_ITERATION = "exit_iteration"


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Model, optimizer and position of a run. `stop_reason`, `validation_losses` and the position change over time."""

    config: TrainConfig
    layout: Layout
    rank: RankLayout
    chunks: Sequence[VisionLanguageModel]
    """The model of this rank, without wrappers."""
    wrapped: Sequence[DistributedDataParallel]
    """The same chunks with gradient buffers, as the schedules expect them."""
    optimizer: MegatronOptimizer
    objective: Objective
    plan: Plan
    quarantine: Quarantine = Quarantine()
    """Samples that are left out of the training."""
    iteration: int = 0
    """Steps done."""
    consumed_samples: int = 0
    consumed_hash: str = ""
    """Of the samples of all steps done; see `chain_hash`."""
    seen: Seen | None = field(default_factory=Seen)
    """Of each dataset; None: the run began with a version that did not count it."""
    dataset_sizes: Mapping[str, int] = field(default_factory=dict)
    """Samples of each dataset, by name."""
    past_records: PastRecords | None = None
    """Of metrics.jsonl, on the rank that reports, while the hooks start: until the lost ones are cut off."""
    goodput: Goodput | None = None
    """On the rank that reports, from the first step of an attempt on."""
    base: Base | None = None
    """The checkpoint with the weights that do not learn, if the model has an adapter."""
    damaged_checkpoints: Mapping[str, str] = field(default_factory=dict)
    """First fault of each newer checkpoint than the one that was resumed, by its name."""
    stop_reason: str | None = None
    """Why the loop ends before train_iters: SIGNALLED (a signal, or exit_duration_minutes) or EXIT_ITERATION; None: it
    goes on."""
    dataset_names: Sequence[str] = field(default=())
    """One for each entry of the blend; losses are reported under them."""
    bad_samples: BadSamples | None = None
    """Keeps account of samples with images that cannot be read; None: nobody does."""
    validation_losses: Mapping[str, float] = field(default_factory=dict)
    """Results of the validation after this iteration, by metric name; empty if none was due."""

    @property
    def train_iters(self) -> int:
        """Steps of the whole run."""
        return self.plan.num_iterations

    def rank_slice(self, *, has_tower: bool = False) -> RankSlice:
        """Return this rank's slice of every global batch; it includes pixels only if the chunk has the tower."""
        images = self.rank.image_share(vision_tensor_parallel=self.config.parallel.vision_tensor_parallel)
        return RankSlice(
            data_parallel_rank=self.rank.dp_rank,
            data_parallel_size=self.rank.dp_size,
            micro_batch_size=self.config.training.micro_batch_size,
            image_share=images if has_tower else None,
            context_share=self.rank.context_share,
        )

    def gather_parameters(self) -> None:
        """Make the weights complete on every rank.

        With `overlap_param_gather`, a step updates only a rank's own shard; the rest follows in the next forward pass.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)

    def progress(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint keeps beside the tensors."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "seen": None if self.seen is None else self.seen.to_dict(),
            "train_iters": self.train_iters,
            "plan_hash": self.plan.hash,
            "plan_data_hash": self.plan.hashes.data,
            "plan_settings_hash": self.plan.hashes.settings,
            "plan_datasets": list(self.plan.datasets_until(self.iteration)),
            "consumed_hash": self.consumed_hash,
            "plan_stable_iterations": self.plan.stable_iterations,
            "stage": self.config.stage,
        }

    @property
    def is_reporter(self) -> bool:
        """Whether this rank writes logs and metrics: the first rank of the last stage, where the loss is."""
        return self.rank.is_last_stage and self.rank.dp_rank == self.rank.cp_rank == self.rank.tp_rank == 0
