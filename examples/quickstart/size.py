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

SMOKE = RunSize(
    corpus=CorpusOptions(
        num_pictures=400, num_test_questions=200, pair_views=1, document_views=1, conversation_views=1
    ),
    stage_overrides={
        "align": ("training.train_iters=5",),
        "pretrain": ("training.train_iters=16", "checkpoint.save_interval=6"),
        "sft": ("training.train_iters=20",),
    },
    kill_after=9,
    straight_iterations=12,
)
