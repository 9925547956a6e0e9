"""How large a quickstart run is: the real one and the smoke run."""

from dataclasses import dataclass

from quickstart.corpus import CorpusOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """Everything in which the two runs differ."""

    corpus: CorpusOptions
    stage_overrides: dict[str, tuple[str, ...]]
    """Further settings of each stage; the real run takes the YAML files as they are."""
    kill_after: int
    """Iteration of pretrain after which a rank is killed; between two checkpoints."""
    straight_iterations: int
    """Iterations of the uninterrupted run that pretrain is compared with; beyond the kill."""


REAL = RunSize(
    corpus=CorpusOptions(),
    stage_overrides={},
    kill_after=120,
    straight_iterations=140,
)

# Most of so short a run is the start of its processes: half as many are half the time.
_TWO_PROCESSES = ("parallel.pipeline_model_parallel_size=1",)

SMOKE = RunSize(
    corpus=CorpusOptions(
        num_pictures=400, num_test_questions=100, pair_views=1, document_views=1, conversation_views=1
    ),
    stage_overrides={
        "align": (*_TWO_PROCESSES, "training.train_iters=5"),
        "pretrain": (*_TWO_PROCESSES, "training.train_iters=12", "checkpoint.save_interval=5"),
        "sft": (*_TWO_PROCESSES, "training.train_iters=8"),
    },
    kill_after=7,
    straight_iterations=10,
)
