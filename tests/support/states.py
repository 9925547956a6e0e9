"""Stand-ins of a run's state for hooks, which read only a few of its fields."""

from types import SimpleNamespace
from typing import Any

from megatron_vlm.training.step import StepMetrics
from tests.support.configs import tiny_run

METRICS = StepMetrics(
    loss=2.5,
    grad_norm=1.25,
    lr=1e-3,
    dataset_losses=(2.0, float("nan"), 4.0),
    num_labels=40,
    num_tokens=90,
    num_positions=120,
    num_images=3,
    attention_pairs=1000,
    data_wait=0.125,
    seconds=0.5,
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
        "layout": SimpleNamespace(world_size=2),
    }
    return SimpleNamespace(**{**settings, **changes})
