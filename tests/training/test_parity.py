"""Loss and gradient norm do not depend on how a model is spread over ranks or how samples are packed."""

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_vlm.parallel.slicing import ContextShare
from tests.support.configs import SEQ_LENGTH, tiny_model, tiny_run
from tests.support.jobs import batches_of, starting_from
from tests.support.overlap import OVERLAP
from tests.support.samples import make_samples, pack_in_order, sample_length

pytestmark = pytest.mark.distributed

NUM_SAMPLES, NUM_STEPS, ROWS_PER_STEP = 84, 5, 4
# float32: sums of up to 10^5 terms are taken in another order by every layout; 1e-5 is the bar of the project.
TOLERANCE = 1e-5

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2_pp2_sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp2_tp2_sp": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"use_distributed_optimizer": False}),
    "dp2_overlap": (2, OVERLAP),
    "tp2_dp2_sp": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
    "pp2_uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "pp2_virtual2": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": True,
        },
    ),
    "pp3_embedding_and_loss_alone": (
        3,
        {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "E|t*4|L"},
    ),
    "pp2_virtual2_layout": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "Et|t*2||tL",
            "overlap_p2p_comm": True,
        },
    ),
}


def packed_rows():
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(NUM_SAMPLES)]
    rows = pack_in_order(lengths, SEQ_LENGTH)
    return rows + [[] for _ in range(NUM_STEPS * ROWS_PER_STEP - len(rows))]


@pytest.fixture(scope="module")
def initial(workers, tmp_path_factory):
    """A checkpoint of random weights, written by one rank."""
    run_dir = str(tmp_path_factory.mktemp("initial"))
    workers.run("tests.support.jobs:save_initial", 1, config=tiny_run(run_dir))
    return run_dir


def run(workers, config, initial, world_size=1, rows=None, **arguments):
    settings = {"num_samples": NUM_SAMPLES, "num_steps": NUM_STEPS, "rows": rows or packed_rows(), **arguments}
    answers = workers.run(
        "tests.support.jobs:train_steps", world_size, config=starting_from(config, initial), **settings
    )
    assert all(answer.losses == answers[0].losses for answer in answers)
    return answers[0]


@pytest.fixture(scope="module")
def reference(workers, initial):
    steps = run(workers, tiny_run(), initial)
    assert len(set(steps.losses)) == len(set(steps.sample_ids_shas)) == NUM_STEPS
    return steps


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_norm_equal_those_of_one_rank(workers, initial, reference, name):
    world_size, parallel = LAYOUTS[name]
    steps = run(workers, tiny_run(parallel=parallel), initial, world_size)
    assert steps.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)
    assert steps.sample_ids_shas == reference.sample_ids_shas


def test_two_rows_a_micro_batch_equal_one(workers, initial, reference):
    steps = run(workers, tiny_run(training={"micro_batch_size": 2}), initial)
    assert steps.sample_ids_shas == reference.sample_ids_shas
    assert steps.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize("world_size", [1, 4])
def test_packed_rows_equal_one_sample_a_row(workers, initial, reference, world_size):
    packed = packed_rows()
    batches = [packed[i : i + ROWS_PER_STEP] for i in range(0, len(packed), ROWS_PER_STEP)]
    size = 4 * -(-max(sum(map(len, batch)) for batch in batches) // 4)
    rows = []
    for batch in batches:
        single = [[index] for row in batch for index in row]
        rows += single + [[] for _ in range(size - len(single))]
    parallel = LAYOUTS["tp2_pp2_sp"][1] if world_size == 4 else {}
    config = tiny_run(parallel=parallel, training={"global_batch_size": size})
    steps = run(workers, config, initial, world_size, rows=rows)
    assert steps.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize("multiple", [8, 32])
def test_aligned_samples_equal_the_others(workers, initial, multiple):
    lengths = [-(-sample_length(placed.sample, 16) // multiple) * multiple for placed in make_samples(NUM_SAMPLES)]
    rows = pack_in_order(lengths, SEQ_LENGTH)
    rows = rows[: len(rows) // ROWS_PER_STEP * ROWS_PER_STEP]
    steps = {}
    for sample_multiple in (1, multiple):
        config = tiny_run(training={"train_iters": 3})
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sample_multiple=sample_multiple))
        steps[sample_multiple] = run(workers, config, initial, rows=rows, num_steps=3)
    assert steps[multiple].losses == pytest.approx(steps[1].losses, rel=TOLERANCE)
    assert steps[multiple].grad_norms == pytest.approx(steps[1].grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["one_rank", "cp2", "tp2_sp"])
def test_what_stands_at_padding_changes_nothing(workers, initial, name):
    world_size, parallel = LAYOUTS.get(name, (1, {}))
    config = tiny_run(parallel=parallel, training={"recompute": "full"})
    config = starting_from(config, initial)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sample_multiple=32))
    lengths = [-(-sample_length(placed.sample, 16) // 32) * 32 for placed in make_samples(24)]
    rows = pack_in_order(lengths, SEQ_LENGTH)[: 2 * ROWS_PER_STEP]
    job, settings = "tests.support.jobs:gradients_with_padding", {"config": config, "rows": rows, "num_samples": 24}
    gradients = [workers.run(job, world_size, token=token, **settings)[0] for token in (None, 7)]
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0] == gradients[1]


def clustered_rows():
    """Single samples, sorted, and the row length of each batch: its longest sample in steps of 8."""
    samples = make_samples(NUM_STEPS * ROWS_PER_STEP)
    lengths = sorted((sample_length(placed.sample, 16), index) for index, placed in enumerate(samples))
    batches = [lengths[i : i + ROWS_PER_STEP] for i in range(0, len(lengths), ROWS_PER_STEP)]
    row_lengths = [-(-batch[-1][0] // 8) * 8 for batch in batches]
    assert len(set(row_lengths)) > 2
    return [[index] for _, index in lengths], row_lengths


@pytest.mark.parametrize("name", ["one_rank", "pp2", "tp2_pp2_sp", "pp2_virtual2"])
def test_shorter_rows_equal_full_ones(workers, initial, name):
    rows, row_lengths = clustered_rows()
    world_size, parallel = LAYOUTS.get(name, (1, {}))
    full = run(workers, tiny_run(), initial, rows=rows)
    steps = run(workers, tiny_run(parallel=parallel), initial, world_size, rows=rows, row_lengths=row_lengths)
    assert steps.losses == pytest.approx(full.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(full.grad_norms, rel=TOLERANCE)


def test_ignoring_sample_borders_changes_the_loss(workers, initial, reference, monkeypatch):
    steps = workers.run(
        "tests.support.jobs:train_steps_without_borders",
        1,
        config=starting_from(tiny_run(), initial),
        rows=packed_rows(),
        num_samples=NUM_SAMPLES,
    )[0]
    assert abs(steps.losses[0] - reference.losses[0]) > 1e-4 * reference.losses[0]


def test_recomputing_activations_changes_nothing(workers, initial, reference):
    steps = run(workers, tiny_run(training={"recompute": "full"}), initial)
    assert steps.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)


def test_loss_is_the_mean_of_the_datasets_weighted_by_their_labels(reference):
    context_share = ContextShare()
    config, rank = tiny_run(), SimpleNamespace(is_first_stage=False, dp_rank=0, dp_size=1, context_share=context_share)
    batches = list(batches_of(config, rank, packed_rows(), make_samples(NUM_SAMPLES), 0))
    for index, (loss, by_dataset) in enumerate(zip(reference.losses, reference.dataset_losses, strict=True)):
        mine = batches[index * ROWS_PER_STEP : (index + 1) * ROWS_PER_STEP]
        labels = [sum(int((batch.label_datasets == dataset).sum()) for batch in mine) for dataset in (0, 1)]
        assert min(labels) > 0
        even, odd = by_dataset["even"], by_dataset["odd"]
        expected = (even * labels[0] + odd * labels[1]) / sum(labels)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert even != odd


def test_tied_embeddings_are_the_same_at_every_layout(workers, tmp_path):
    config = tiny_run(str(tmp_path), model=tiny_model(share_embeddings_and_output_weights=True))
    workers.run("tests.support.jobs:save_initial", 1, config=config)
    results = [
        run(
            workers,
            dataclasses.replace(config, run_dir="unused", parallel=tiny_run(parallel=p).parallel),
            str(tmp_path),
            n,
        )
        for n, p in ((1, {}), LAYOUTS["tp2_pp2_sp"], LAYOUTS["pp3_embedding_and_loss_alone"])
    ]
    for result in results[1:]:
        assert result.losses == pytest.approx(results[0].losses, rel=TOLERANCE)
        assert result.grad_norms == pytest.approx(results[0].grad_norms, rel=TOLERANCE)
