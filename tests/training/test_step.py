import dataclasses

import pytest
import torch

from megatron_vlm.checkpoint.adam_state import adams
from megatron_vlm.config import NumericError
from megatron_vlm.data.samples import EncodedSample, TextSegment
from megatron_vlm.training.hooks import stop
from megatron_vlm.training.loop import train
from megatron_vlm.training.objective import run_model
from megatron_vlm.training.state import EXIT_ITERATION, SIGNALLED
from megatron_vlm.training.step import train_step
from tests.support.configs import tiny_run
from tests.support.jobs import CPU, FixedPlan, batches_of, start
from tests.support.samples import make_samples, sample_length

ROWS = [[0, 1], [2, 3]] * 3


@pytest.fixture
def state(one_rank, tmp_path):
    config = tiny_run(str(tmp_path), training={"global_batch_size": 2, "train_iters": 3})
    return start(config, FixedPlan.of(config, ROWS))


def loaders(state):
    return [batches_of(state.config, state.rank, ROWS, make_samples(4), 0)]


def test_counts_are_of_what_the_batch_holds(state):
    metrics = train_step(state, loaders(state), device=CPU, stop_requested=False)
    batches = list(batches_of(state.config, state.rank, ROWS[:2], make_samples(4), 0))
    lengths = [length for batch in batches for length in batch.cu_seqlens.diff().tolist()]  # padding is left out
    assert metrics.num_tokens == sum(lengths) == sum(batch.num_tokens for batch in batches)
    assert metrics.attention_pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert metrics.num_positions == 2 * state.config.data.seq_length
    assert metrics.num_images == sum(batch.num_images for batch in batches)
    assert metrics.num_labels == sum(len(batch.label_index) for batch in batches)


def test_losses_of_the_datasets_are_those_of_their_labels(state):
    losses = {0: [], 1: []}
    for batch in batches_of(state.config, state.rank, ROWS[:2], make_samples(4), 0):
        with torch.no_grad():
            output = run_model(state.chunks[0], batch)
        for loss, dataset in zip(output.flatten().tolist(), batch.label_datasets.tolist(), strict=True):
            losses[dataset].append(loss)
    metrics = train_step(state, loaders(state), device=CPU, stop_requested=False)
    expected = [sum(values) / len(values) for values in losses.values()]
    assert list(metrics.dataset_losses.values()) == pytest.approx(expected, rel=1e-6)  # float32 sums in another order
    assert metrics.loss == pytest.approx(sum(sum(losses.values(), [])) / metrics.num_labels, rel=1e-6)


def test_datasets_of_one_name_have_one_loss(state):
    state.dataset_names = ("both", "both")
    metrics = train_step(state, loaders(state), device=CPU, stop_requested=False)
    assert metrics.dataset_losses == {"both": metrics.loss}


def without_labels(placed):
    segments = (one._replace(train=False) if isinstance(one, TextSegment) else one for one in placed.sample.segments)
    return dataclasses.replace(placed, sample=EncodedSample(tuple(segments)))


def test_a_batch_without_labels_has_no_loss_and_leaves_weights_and_optimizer_as_they_are(state, caplog):
    train_step(state, loaders(state), device=CPU, stop_requested=False)  # momentum
    state.iteration = 1
    (adam,) = adams(state.optimizer)
    before = [value.clone() for value in state.chunks[0].state_dict().values() if isinstance(value, torch.Tensor)]
    steps = [float(one["step"]) for one in adam.state.values() if "step" in one]
    samples = list(map(without_labels, make_samples(4)))
    batches = [batches_of(state.config, state.rank, ROWS, samples, 1)]
    with caplog.at_level("WARNING"):
        metrics = train_step(state, batches, device=CPU, stop_requested=False)
    assert (metrics.loss, metrics.dataset_losses, metrics.num_labels, metrics.grad_norm) == (None, {}, 0, 0.0)
    assert metrics.num_tokens > 0
    after = [value for value in state.chunks[0].state_dict().values() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert [float(one["step"]) for one in adam.state.values() if "step" in one] == steps
    assert "no token of iteration 2 has a loss: the weights stay as they are" in caplog.text
    state.iteration = 2
    assert train_step(state, loaders(state), device=CPU, stop_requested=False).loss is not None


def test_padding_inside_segments_is_not_counted(state):
    state.config = dataclasses.replace(state.config, data=dataclasses.replace(state.config.data, sample_multiple=32))
    metrics = train_step(state, loaders(state), device=CPU, stop_requested=False)
    lengths = [sample_length(placed.sample, 16) for placed in make_samples(4)]
    assert metrics.num_tokens == sum(lengths)
    assert metrics.attention_pairs == sum(n * (n + 1) // 2 for n in lengths)


def test_a_loss_that_is_not_finite_ends_the_run(state):
    with torch.no_grad():
        state.chunks[0].vision_projection.encoder.linear_fc1.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="loss is nan at iteration 1"):
        train_step(state, loaders(state), device=CPU, stop_requested=False)


def values_of_run(state):
    """Return copies of all weights and of everything that Adam has by name."""
    values = {name: value.detach().clone() for name, value in state.chunks[0].named_parameters()}
    for number, entry in enumerate(adams(state.optimizer)[0].state.values()):
        values |= {f"{number} {name}": value.clone() for name, value in entry.items()}
    return values


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("place", ["loss", "gradient", "samples"])
def test_what_is_not_finite_or_not_planned_changes_neither_weights_nor_optimizer(
    one_rank, tmp_path, monkeypatch, place, distributed
):
    config = tiny_run(
        str(tmp_path),
        training={"global_batch_size": 2, "train_iters": 3},
        parallel={"use_distributed_optimizer": distributed},
    )
    state = start(config, FixedPlan.of(config, ROWS))
    train_step(state, loaders(state), device=CPU, stop_requested=False)
    state.iteration = 1
    before = values_of_run(state)
    rows = [[0, 1], [2, 2]] if place == "samples" else ROWS[2:]
    if place == "gradient":
        prepare = type(state.optimizer).prepare_grads

        def spoiled(optimizer):
            next(state.chunks[0].parameters()).main_grad.view(-1)[0] = float("inf")
            return prepare(optimizer)

        monkeypatch.setattr(type(state.optimizer), "prepare_grads", spoiled)
    if place == "loss":
        reduce = state.objective.reduce
        monkeypatch.setattr(
            state.objective, "reduce", lambda *args, **kwargs: spoil_loss(reduce(*args, **kwargs)), raising=False
        )
    loader = batches_of(state.config, state.rank, rows, make_samples(4), 0)
    with pytest.raises(NumericError, match="planned" if place == "samples" else "at iteration 2"):
        train_step(state, [loader], device=CPU, stop_requested=False)
    after = values_of_run(state)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def spoil_loss(reduced):
    loss, labels, sums = reduced
    return loss * float("nan"), labels, sums * float("nan")


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[2, 3], [0, 1]], id="exchanged rows"),
        pytest.param([[1, 0], [2, 3]], id="samples in another order"),
        pytest.param([[0, 1], [2]], id="a missing sample"),
        pytest.param([[0, 1], [2, 2]], id="a wrong sample"),
    ],
)
def test_samples_that_are_not_those_of_the_plan_end_the_run(state, rows):
    loader = batches_of(state.config, state.rank, rows, make_samples(4), 0)
    with pytest.raises(NumericError, match="consumed at iteration 1 with hash [0-9a-f]{16} are not the planned ones"):
        train_step(state, [loader], device=CPU, stop_requested=False)


@pytest.mark.distributed
def test_samples_of_a_rank_that_computes_no_loss_are_compared_too(workers):
    config = tiny_run(parallel={"tensor_model_parallel_size": 2}, training={"global_batch_size": 2, "train_iters": 3})
    answers = workers.run("tests.support.jobs:step_with_a_wrong_rank", 2, config=config, rows=ROWS, wrong_rank=1)
    assert len(set(answers)) == 1
    assert "consumed at iteration 1 on a rank that computes no loss are not the planned" in answers[0]


def test_a_stop_request_ends_the_run_after_the_step(state):
    train(state, loaders(state), [stop.Hook()], device=CPU, stop_requested=lambda: state.iteration == 1)
    assert state.iteration == 2
    assert state.stop_reason == SIGNALLED


def test_exit_iteration_ends_the_run(state):
    state.config = dataclasses.replace(
        state.config, training=dataclasses.replace(state.config.training, exit_iteration=1)
    )
    train(state, loaders(state), [stop.Hook()], device=CPU, stop_requested=lambda: False)
    assert state.iteration == 1
    assert state.stop_reason == EXIT_ITERATION


def test_the_run_ends_at_train_iters(state):
    train(state, loaders(state), [stop.Hook()], device=CPU, stop_requested=lambda: False)
    assert state.iteration == 3
    assert state.stop_reason is None


def test_steps_replicas_and_stages_draw_other_numbers_and_tensor_parallel_ranks_the_same(state, monkeypatch):
    class Drawn(Exception):  # noqa: N818
        pass

    def record(seed):
        seeds.append(seed)
        raise Drawn

    seeds, place = [], state.rank
    monkeypatch.setattr("megatron_vlm.training.gradients.seed_everything", record)
    for iteration, changes in ((0, {}), (0, {"tp_rank": 1}), (0, {"dp_rank": 1}), (0, {"pp_rank": 1}), (1, {})):
        state.iteration, state.rank = iteration, dataclasses.replace(place, **changes)
        with pytest.raises(Drawn):
            train_step(state, [], device=CPU, stop_requested=False)
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 4
