import dataclasses
import importlib.util

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.requirements import check_requirements
from tests.support.configs import tiny_run


@pytest.fixture
def transformer_engine(monkeypatch):
    """Say that the library is installed or not: `transformer_engine(True)`."""
    find_spec = importlib.util.find_spec

    def install(is_there):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if is_there else None) if name == "transformer_engine" else find_spec(name),
        )

    return install


def test_fp8_without_transformer_engine_is_refused(transformer_engine):
    transformer_engine(False)
    with pytest.raises(ConfigError, match=r"training.fp8=hybrid needs transformer-engine, which is not installed"):
        check_requirements(tiny_run(training={"fp8": "hybrid"}), num_gpus=8, num_workers=8)


def test_fp8_without_a_gpu_is_refused(transformer_engine):
    transformer_engine(True)
    with pytest.raises(ConfigError, match=r"training.fp8=hybrid needs a GPU.*remove training.fp8"):
        check_requirements(tiny_run(training={"fp8": "hybrid"}), num_gpus=0, num_workers=1)


def test_fp8_with_both_is_accepted(transformer_engine):
    transformer_engine(True)
    check_requirements(tiny_run(training={"fp8": "hybrid"}), num_gpus=8, num_workers=8)


def test_transformer_engine_backend_without_the_library_is_refused(transformer_engine):
    transformer_engine(False)
    config = dataclasses.replace(tiny_run(), model=dataclasses.replace(tiny_run().model, backend="transformer_engine"))
    with pytest.raises(ConfigError, match=r"model.backend=transformer_engine needs transformer-engine"):
        check_requirements(config, num_gpus=8, num_workers=8)


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"8 ranks on a node with 4 visible GPUs.*--nproc-per-node 4"):
        check_requirements(tiny_run(), num_gpus=4, num_workers=8)


def test_any_number_of_ranks_runs_without_a_gpu():
    check_requirements(tiny_run(), num_gpus=0, num_workers=8)
