"""Values of the record, computed by hand."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.training import metrics
from megatron_vlm.training.metrics import metrics_record, scalars
from tests.support.states import METRICS, make_state


@pytest.fixture
def flops(monkeypatch):
    """Let every step take 3 TFLOP."""
    monkeypatch.setattr(metrics, "step_flops", lambda model, freeze, work: SimpleNamespace(total=3e12))


def on_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


def test_rates_are_per_second_and_flops_per_rank(flops):
    record = metrics_record(make_state(iteration=3), METRICS)  # 0.5 s on two ranks
    assert record["tflops_per_rank"] == 3.0
    assert record["tokens_per_s"] == 180.0
    assert record["padding"] == 0.25
    assert (record["data_wait"], record["data_wait_fraction"]) == (0.125, 0.25)
    assert (record["iteration"], record["consumed_samples"], record["sample_ids_sha"]) == (3, 12, "00ff")


def test_mfu_is_the_fraction_of_the_peak(flops, monkeypatch):
    on_device(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert metrics_record(make_state(), METRICS)["mfu"] == pytest.approx(3 / 989)


def test_no_mfu_is_reported_where_the_peak_is_not_known(flops, monkeypatch):
    assert metrics_record(make_state(), METRICS)["mfu"] is None
    on_device(monkeypatch, "Some Other Device")
    assert metrics_record(make_state(), METRICS)["mfu"] is None


def test_flops_are_counted_from_what_the_step_held(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "step_flops", lambda *arguments: seen.append(arguments) or SimpleNamespace(total=1.0))
    metrics_record(make_state(training={"freeze": ("vision_model",)}), METRICS)
    ((model, freeze, work),) = seen
    assert (model, freeze) == (make_state().config.model, ("vision_model",))
    assert dataclasses.asdict(work) == {
        "num_tokens": 90,
        "attention_pairs": 1000,
        "num_labels": 40,
        "num_images": 3,
    }


def test_losses_stand_under_the_names_of_their_datasets():
    record = metrics_record(make_state(), METRICS)
    assert {key: value for key, value in record.items() if key.startswith("loss/")} == {
        "loss/coyo": 2.0,
        "loss/mmc4": 4.0,
    }
    assert (record["loss"], float.fromhex(record["loss_hex"])) == (2.5, 2.5)
    assert float.fromhex(record["grad_norm_hex"]) == record["grad_norm"] == 1.25


def test_loss_of_a_step_without_labels_is_null(flops):
    record = metrics_record(make_state(), dataclasses.replace(METRICS, loss=None, dataset_losses={}, num_labels=0))
    assert (record["loss"], record["loss_hex"]) == (None, None)
    assert not any(key.startswith("loss/") for key in record)
    assert "loss" not in scalars(record)


def test_what_was_seen_stands_under_the_names_of_the_datasets():
    record = metrics_record(make_state(), METRICS)
    assert {key: value for key, value in record.items() if key.startswith(("tokens/", "seen_tokens/", "passes/"))} == {
        "tokens/coyo": 50,
        "tokens/text": 0,
        "tokens/mmc4": 40,
        "seen_tokens/coyo": 200,
        "seen_tokens/mmc4": 100,
        "passes/coyo": 2.5,
        "passes/text": 0.0,
        "passes/mmc4": 0.75,
    }


def test_nothing_is_said_of_what_a_run_of_an_earlier_version_has_seen():
    record = metrics_record(make_state(seen=None), METRICS)
    assert not [key for key in record if key.startswith(("seen_tokens/", "passes/"))]


def test_images_of_the_fullest_rank_are_told_over_the_mean():
    assert metrics_record(make_state(), METRICS)["image_imbalance"] == pytest.approx(2 / 1.5)
    without = dataclasses.replace(METRICS, images_of_ranks=(0, 0))
    assert metrics_record(make_state(), without)["image_imbalance"] is None


def test_phases_and_goodput_are_told():
    record = metrics_record(make_state(), METRICS)
    found = {key: value for key, value in record.items() if key.startswith("seconds/")}
    assert found == {"seconds/data": 0.125, "seconds/forward_backward": 0.25, "seconds/optimizer": 0.0625}
    assert (record["goodput"], record["unix_time"]) == (0.75, 1060.0)  # 45 of 60 s
    assert metrics_record(make_state(goodput=None), METRICS)["goodput"] is None


def test_validation_is_part_of_the_record_of_its_iteration():
    assert "validation_loss" not in metrics_record(make_state(), METRICS)
    record = metrics_record(make_state(validation_losses={"validation_loss": 1.5}), METRICS)
    assert record["validation_loss"] == 1.5


def test_curves_show_measured_numbers_only():
    shown = scalars(metrics_record(make_state(), METRICS))
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "data_wait",
        "tflops_per_rank",
        "padding",
        "tokens",
        "passes/coyo",
        "seconds/data",
    } <= shown.keys()
    assert not {"iteration", "unix_time", "stage", "mfu", "loss_hex"} & shown.keys()
    assert not any(math.isnan(value) for value in shown.values())


def test_parts_of_a_split_dataset_count_together(flops):
    record = metrics_record(make_state(dataset_names=("coyo", "text", "coyo")), METRICS)
    assert (record["tokens/coyo"], record["tokens/text"]) == (90, 0)
