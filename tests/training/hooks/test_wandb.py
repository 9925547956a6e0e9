import json

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.hooks.wandb import Config
from megatron_vlm.training.hooks.wandb import Hook
from megatron_vlm.training.metrics import metrics_record, scalars
from tests.support.states import METRICS, make_state

# Keeps in a file what a run is told.
STAND_IN = """
import json

class Run:
    def __init__(self, settings):
        self.path = settings["dir"] + "/told.jsonl"
        self.tell("init", settings)

    def tell(self, what, content):
        with open(self.path, "a") as stream:
            stream.write(json.dumps([what, content]) + "\\n")

    def log(self, values, step):
        self.tell("log", [step, values])

    def finish(self):
        self.tell("finish", None)

def init(**settings):
    return Run(settings)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)


def report(run_dir, resumed, iterations, **settings):
    hook = Hook(Config(project="vlm", **settings))
    hook.start(make_state(run_dir, resumed))
    for iteration in iterations:
        hook.step(make_state(run_dir, iteration), METRICS)
    hook.close(make_state(run_dir, iterations[-1]))
    return [json.loads(line) for line in (run_dir / "told.jsonl").read_text().splitlines()]


def test_names_and_values_are_those_of_tensorboard(wandb, tmp_path):
    told = report(tmp_path / "run", 0, [1, 2])
    assert [what for what, _ in told] == ["init", "log", "log", "finish"]
    expected = scalars(metrics_record(make_state(iteration=2), METRICS))
    assert told[2][1] == [2, expected]
    assert {"loss", "loss/coyo", "grad_norm"} <= expected.keys()


def test_settings_of_the_run_are_reported(wandb, tmp_path):
    (_, settings), *_ = report(tmp_path / "run", 0, [1], mode="offline", entity="team")
    assert {key: settings[key] for key in ("project", "entity", "name", "mode", "dir", "resume")} == {
        "project": "vlm",
        "entity": "team",
        "name": "run",
        "mode": "offline",
        "dir": str(tmp_path / "run"),
        "resume": "allow",
    }
    assert settings["config"]["training"]["global_batch_size"] == 4


def test_a_resumed_run_goes_on_under_its_id(wandb, tmp_path):
    report(tmp_path / "run", 0, [1, 2])
    told = report(tmp_path / "run", 2, [3])
    ids = [content["id"] for what, content in told if what == "init"]
    assert len(ids) == 2
    assert ids[0] == ids[1]


def test_other_ranks_report_nothing(wandb, tmp_path):
    hook, state = Hook(Config(project="vlm")), make_state(tmp_path / "run", is_reporter=False)
    hook.start(state)
    hook.step(state, METRICS)
    hook.close(state)
    assert not (tmp_path / "run").exists()


def test_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, which needs wandb; it is not installed; fix: pip install"):
        Hook(Config(project="vlm")).start(make_state(tmp_path))
