"""A GPU computes what the CPU computes, in every precision and with both kinds of layers, and goes on bit for bit.

Every test runs on the CPU, too, where it compares what can be compared there: one body, whatever the device.
"""

import importlib.util

import pytest
import torch

from tests.support.device_runs import (
    DeviceRun,
    count_waits,
    forward_and_backward,
    measure,
    measure_apart,
    save_weights,
    train,
)

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
GPU = pytest.mark.gpu
NEEDS_TRANSFORMER_ENGINE = pytest.mark.skipif(not HAS_TRANSFORMER_ENGINE, reason="transformer-engine is not installed")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
LAYERS = [
    pytest.param("cpu", "torch", "fp32"),
    pytest.param("cpu", "torch", "bf16"),
    pytest.param("cuda", "torch", "fp32", marks=GPU),
    pytest.param("cuda", "torch", "bf16", marks=GPU),
    pytest.param("cuda", "transformer_engine", "bf16", marks=[GPU, NEEDS_TRANSFORMER_ENGINE]),
]
# float32: sums in another order, and the products of the patch embedding in TF32 on a GPU. bf16: 8 bits a number; a
# rounding of 2**-9 in each of some ten operations a layer.
LOSS_TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}
GRADIENT_TOLERANCE = {"fp32": 2e-3, "bf16": 6e-2}


@pytest.fixture(autouse=True)
def gpu(request):
    """Skip a test of a GPU where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU is visible")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with weights made on the CPU, from which all runs start."""
    folder = str(tmp_path_factory.mktemp("weights"))
    measure(DeviceRun(device="cpu", folder=folder), save_weights)
    return folder


@pytest.fixture(scope="module")
def reference(weights):
    """What the CPU computes in fp32."""
    return measure(DeviceRun(device="cpu", folder="unused", start_from=weights), forward_and_backward)


@pytest.fixture(scope="module")
def passes(weights):
    """Forward and backward passes by their settings, each done once."""
    done = {}

    def get(*settings):
        if settings not in done:
            run = dict(zip(("device", "backend", "precision"), settings, strict=True))
            done[settings] = measure(DeviceRun(**run, folder="unused", start_from=weights), forward_and_backward)
        return done[settings]

    return get


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the norm of the difference over that of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("device", "backend", "precision"), LAYERS)
def test_losses_are_those_of_the_cpu_in_fp32(passes, reference, device, backend, precision):
    found = passes(device, backend, precision)
    torch.testing.assert_close(found.losses, reference.losses, rtol=0, atol=LOSS_TOLERANCE[precision] * 5)
    assert float(found.losses.mean()) == pytest.approx(float(reference.losses.mean()), rel=LOSS_TOLERANCE[precision])


@pytest.mark.parametrize(("device", "backend", "precision"), LAYERS)
def test_gradients_are_those_of_the_cpu_in_fp32(passes, reference, device, backend, precision):
    found = passes(device, backend, precision)
    assert found.gradients.keys() == reference.gradients.keys()
    far = {name: distance(found.gradients[name], gradient) for name, gradient in reference.gradients.items()}
    assert {name: far[name] for name in far if not far[name] < GRADIENT_TOLERANCE[precision]} == {}


@pytest.mark.parametrize(("device", "backend", "precision"), LAYERS)
def test_packed_samples_have_the_losses_of_each_alone(passes, device, backend, precision):
    found = passes(device, backend, precision)
    torch.testing.assert_close(found.losses, found.losses_alone, rtol=0, atol=LOSS_TOLERANCE[precision] * 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_deterministic_run_resumes_bit_equal(device, precision, tmp_path):
    settings = {"device": device, "precision": precision, "deterministic": True}
    whole = measure(DeviceRun(**settings, folder=str(tmp_path / "whole")), train, num_steps=4)
    halves = DeviceRun(**settings, folder=str(tmp_path / "halves"))
    assert measure(halves, train, num_steps=2, save=True) + measure(halves, train, num_steps=2) == whole


@pytest.mark.parametrize(
    ("device", "exact", "rough", "num_steps"),
    [
        pytest.param("cpu", {"precision": "fp32"}, {"precision": "bf16"}, 6),
        pytest.param("cuda", {"precision": "fp32"}, {"precision": "bf16"}, 50, marks=GPU),
        pytest.param(
            "cuda",
            {"precision": "bf16", "backend": "transformer_engine"},
            {"precision": "bf16", "backend": "transformer_engine", "fp8": True},
            50,
            marks=[GPU, NEEDS_TRANSFORMER_ENGINE],
        ),
    ],
)
def test_a_rougher_precision_has_the_same_mean_loss_within_one_percent(weights, device, exact, rough, num_steps):
    if rough.get("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    means = []
    for settings in (exact, rough):
        run = DeviceRun(device=device, **settings, folder="unused", start_from=weights, train_iters=num_steps)
        losses = [float.fromhex(loss) for loss, _ in measure(run, train, num_steps=num_steps)]
        means.append(sum(losses) / num_steps)
    assert means[1] == pytest.approx(means[0], rel=0.01)


@pytest.mark.parametrize("backend", ["torch", pytest.param("transformer_engine", marks=NEEDS_TRANSFORMER_ENGINE)])
@pytest.mark.gpu
def test_the_host_waits_for_the_device_at_most_three_times_a_step(backend):
    run = DeviceRun(device="cuda", folder="unused", backend=backend, precision="bf16")
    assert measure(run, count_waits) <= 3


def test_the_host_reads_few_values_in_a_step_on_the_cpu():
    # The CPU's attention splits the samples on the host; nothing else may grow with layers or micro-batches.
    assert measure(DeviceRun(device="cpu", folder="unused"), count_waits) <= 3


def test_a_run_in_a_process_of_its_own_measures_the_same(reference, weights):
    run = DeviceRun(device="cpu", folder="unused", start_from=weights)
    found = measure_apart(run, forward_and_backward)
    assert torch.equal(found.losses, reference.losses)
    assert all(torch.equal(found.gradients[name], gradient) for name, gradient in reference.gradients.items())
