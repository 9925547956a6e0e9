"""A run goes on whichever layers and whichever optimizer the next machine has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import list_tensors
from megatron_vlm.config import CheckpointConfig
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import export_model
from megatron_vlm.parallel.groups import single_process
from tests.support.configs import tiny_model, tiny_run
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

pytestmark = pytest.mark.distributed

STEPS_BEFORE, STEPS_AFTER = 2, 2
# Layers of a machine, and the optimizer that megatron-core finds there.
HOST = ("torch", "AdamW")
GPU = ("transformer_engine", "FusedAdam")
GPU_WITH_TORCH_LAYERS = ("torch", "FusedAdam")
MACHINES = {"host": HOST, "gpu": GPU, "gpu_torch_layers": GPU_WITH_TORCH_LAYERS}
LAYOUTS = {
    "one_rank": (1, {}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"use_distributed_optimizer": False}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2_pp2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def config_of(folder, layout="one_rank", machine=GPU, precision="bf16", model=None):
    model = replace(model or tiny_model(vocab_size=NUM_PIECES), backend=machine[0])
    return tiny_run(str(folder), parallel=LAYOUTS[layout][1], model=model, training={"precision": precision})


@pytest.fixture
def run(te_workers, tmp_path):
    """Do steps and save: run("name", steps, layout=..., machine=...); returns the folder of the run."""

    def start(name, num_steps, *, layout="one_rank", machine=GPU, weights=None, **settings):
        config = config_of(tmp_path / name, layout, machine, **settings)
        config = replace(config, checkpoint=CheckpointConfig(load_weights=weights))
        world_size = LAYOUTS[layout][0]
        te_workers.run(
            "tests.transformer_engine.jobs:run", world_size, config=config, adam=machine[1], num_steps=num_steps
        )
        return tmp_path / name

    return start


def content(run_dir):
    """Return every tensor of the newest checkpoint of a run, whole, and the step that the optimizer counts."""
    path = str(find_checkpoint(run_dir))
    with single_process():
        tensors = dist_checkpointing.load_plain_tensors(path)
        step = dist_checkpointing.load_common_state_dict(path)["optimizer"]["step"]
    return {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}, step


def assert_same(run_dir, other):
    (tensors, step), (expected, expected_step) = content(run_dir), content(other)
    assert step == expected_step
    assert tensors.keys() == expected.keys()
    assert any(key.startswith("optimizer.") for key in tensors)
    different = [key for key, tensor in expected.items() if not torch.equal(tensors[key], tensor)]
    assert not different


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_is_uninterrupted_to_the_bit(run, layout):
    whole = run("whole", STEPS_BEFORE + STEPS_AFTER, layout=layout)
    run("interrupted", STEPS_BEFORE, layout=layout)
    resumed = run("interrupted", STEPS_AFTER, layout=layout)
    assert content(resumed)[1] == STEPS_BEFORE + STEPS_AFTER
    assert_same(resumed, whole)


@pytest.mark.parametrize(("first", "then"), [(a, b) for a in MACHINES for b in MACHINES if a != b])
def test_another_machine_goes_on_to_the_bit(run, first, then):
    whole = run("whole", STEPS_BEFORE + STEPS_AFTER, layout="tp2_sp", machine=MACHINES[first])
    run("moved", STEPS_BEFORE, layout="tp2_sp", machine=MACHINES[first])
    moved = run("moved", STEPS_AFTER, layout="tp2_sp", machine=MACHINES[then])
    assert_same(moved, whole)


@pytest.mark.parametrize("machines", [(GPU, GPU), (GPU, HOST), (HOST, GPU)], ids=str)
@pytest.mark.parametrize(("first", "then"), [("tp2_dp2", "one_rank"), ("one_rank", "tp2_pp2"), ("tp2_pp2", "dp2")])
def test_another_layout_holds_the_same_state(run, first, then, machines):
    saved = run("first", STEPS_BEFORE, layout=first, machine=machines[0])
    expected = content(saved)
    moved = run("first", 0, layout=then, machine=machines[1])
    tensors, step = content(moved)
    assert step == expected[1] == STEPS_BEFORE
    assert tensors.keys() == expected[0].keys()
    assert not [key for key, tensor in expected[0].items() if not torch.equal(tensors[key], tensor)]


def test_fp32_resumes_too(run):
    whole = run("whole", STEPS_BEFORE + STEPS_AFTER, precision="fp32")
    run("interrupted", STEPS_BEFORE, precision="fp32")
    assert_same(run("interrupted", STEPS_AFTER, precision="fp32"), whole)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """A folder as `convert to-hf` writes it, with random weights."""
    folder = tmp_path_factory.mktemp("hugging_face")
    tokenizer = train_sentence_piece(folder)
    write_random_run(folder / "run", tiny_model(vocab_size=NUM_PIECES), tokenizer)
    export_model(read_run_settings(folder / "run"), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def start(hugging_face, tmp_path_factory):
    """The run that `convert from-hf` makes of it, and its model."""
    folder = tmp_path_factory.mktemp("start")
    return folder, import_model(hugging_face, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_convert_from_hf(te_workers, start, layout, tmp_path):
    folder, model = start
    world_size = LAYOUTS[layout][0]
    ranks = [
        te_workers.run(
            "tests.transformer_engine.jobs:loaded_weights",
            world_size,
            config=config_of(tmp_path / "new", layout, machine, model=model),
            weights=str(folder),
        )
        for machine in (GPU, GPU_WITH_TORCH_LAYERS)
    ]
    for weights, expected in zip(*ranks, strict=True):
        assert weights.keys() == expected.keys()
        assert not [where for where, weight in expected.items() if not torch.equal(weights[where], weight)]


def test_what_was_started_from_convert_from_hf_goes_back(run, start, hugging_face, tmp_path):
    folder, model = start
    trained = run("trained", 0, layout="tp2_pp2", weights=str(folder), model=model, precision="fp32")
    export_model(read_run_settings(trained, tokenizer=str(folder / "tokenizer.model")), tmp_path / "back")
    from safetensors.torch import load_file

    weights, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "back", hugging_face))
    assert weights.keys() == expected.keys()
    assert not [name for name, weight in expected.items() if not torch.equal(weights[name], weight)]


def test_a_checkpoint_holds_tensors_only(run):
    checkpoint = find_checkpoint(run("run", 1))
    with single_process():
        entries = load_sharded_metadata(str(checkpoint))
    assert not [key for key in entries if "_extra_state" in key]
    assert list_tensors(checkpoint) == list_tensors(find_checkpoint(run("host", 1, machine=HOST)))
