"""Stand-ins of a run's state for hooks, which read only a few of its fields."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from megatron_vlm.platform.step_phases import StepPhase
from megatron_vlm.training.goodput import Goodput
from megatron_vlm.training.seen import Seen
from megatron_vlm.training.step import StepMetrics
from tests.support.configs import tiny_run

METRICS = StepMetrics(
    loss=2.5,
    grad_norm=1.25,
    lr=1e-3,
    dataset_losses={"coyo": 2.0, "mmc4": 4.0},
    num_labels=40,
    num_tokens=90,
    num_positions=120,
    num_images=3,
    attention_pairs=1000,
    dataset_samples=(2, 0, 1),
    dataset_tokens=(50, 0, 40),
    images_of_ranks=(2, 1),
    data_wait=0.125,
    seconds=0.5,
    phase_seconds={StepPhase.DATA: 0.125, StepPhase.FORWARD_BACKWARD: 0.25, StepPhase.OPTIMIZER: 0.0625},
    ended_at=1060.0,
    stop_requested=False,
    sample_ids_sha="00ff",
)


def make_state(run_dir: object = "unused", iteration: int = 0, **changes: Any) -> SimpleNamespace:
    """Return the state of a run of 10 iterations on two ranks, on its reporting rank."""
    settings = {
        "config": tiny_run(str(run_dir), training=changes.pop("training", {})),
        "iteration": iteration,
        "consumed_samples": 4 * iteration,
        "train_iters": 10,
        "stop_reason": None,
        "is_reporter": True,
        "dataset_names": ("coyo", "text", "mmc4"),
        "validation_losses": {},
        "bad_samples": None,
        "past_records": None,
        "damaged_checkpoints": {},
        "layout": SimpleNamespace(world_size=2),
        "seen": Seen(Counter({"coyo": 5, "mmc4": 3}), Counter({"coyo": 200, "mmc4": 100})),
        "dataset_sizes": {"coyo": 2, "text": 4, "mmc4": 4},
        "goodput": Goodput(first_start=1000.0, seconds_in_steps=45.0),
    }
    return SimpleNamespace(**{**settings, **changes})
