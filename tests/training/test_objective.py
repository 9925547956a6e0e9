"""A new objective is one file for its settings and one for its computation, wherever their packages find them."""

import dataclasses
import sys

import pytest

import megatron_vlm.config.objectives
import megatron_vlm.training.objectives
from megatron_vlm.config import ConfigError, load_config, save_config
from megatron_vlm.config.train import TrainConfig
from megatron_vlm.training.objective import build_objective
from megatron_vlm.training.step import train_step
from tests.support.configs import tiny_run
from tests.support.jobs import CPU, FixedPlan, batches_of, start
from tests.support.samples import make_samples

SETTINGS = """
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    type: Literal["twice"] = "twice"
    factor: float = 2.0
"""
COMPUTATION = """
from megatron_vlm.training.objectives import language_modelling

class Objective(language_modelling.Objective):
    def reduce(self, output, batch, num_datasets):
        loss, count, sums = super().reduce(output, batch, num_datasets)
        sums[0] *= self.config.factor
        return loss * self.config.factor, count, sums
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """The config of a run whose objective is twice the cross-entropy, added without a change to any file."""
    for package, code in ((megatron_vlm.config.objectives, SETTINGS), (megatron_vlm.training.objectives, COMPUTATION)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "twice.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    save_config(tiny_run(training={"global_batch_size": 2, "train_iters": 2}), tmp_path / "run.yaml")
    yield load_config(TrainConfig, tmp_path / "run.yaml", ["training.objective={type: twice}"])
    for package in (megatron_vlm.config.objectives, megatron_vlm.training.objectives):
        sys.modules.pop(f"{package.__name__}.twice", None)


def first_loss(config):
    rows = [[0, 1], [2, 3]]
    state = start(config, FixedPlan.of(config, rows))
    loader = batches_of(config, state.rank, rows, make_samples(4), 0)
    return train_step(state, [loader], device=CPU, stop_requested=False).loss


def test_objective_is_found_by_its_name(one_rank, twice):
    plain = dataclasses.replace(
        twice, training=dataclasses.replace(twice.training, objective=tiny_run().training.objective)
    )
    assert first_loss(twice) == 2 * first_loss(plain)


def test_unknown_objective_lists_those_there_are(tmp_path):
    save_config(tiny_run(), tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"unknown training.objective.type 'distil'.*language_modelling"):
        load_config(TrainConfig, tmp_path / "run.yaml", ["training.objective.type=distil"])


def test_objective_without_a_computation_is_refused(twice, monkeypatch):
    monkeypatch.setattr(megatron_vlm.training.objectives, "__path__", megatron_vlm.training.objectives.__path__[:1])
    with pytest.raises(ConfigError, match="unknown training.objective.type 'twice'"):
        build_objective(twice.training.objective)
