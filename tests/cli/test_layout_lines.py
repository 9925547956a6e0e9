import dataclasses

import pytest

from megatron_vlm.cli.layout_lines import layout_facts, layout_lines
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.layouts import rank_layouts
from megatron_vlm.costs.rows import pairs
from megatron_vlm.platform.gpus import GPUS
from tests.support.configs import tiny_run

A100 = Cluster(gpu_name="A100")


def lines_of(config, world_size=4, num_iterations=None, cluster=A100):
    ranking = rank_layouts(config, world_size, cluster, backend="torch")
    facts = layout_facts(ranking, cluster, pairs(config), config.model.language.num_layers)
    return facts, layout_lines(facts, world_size, cluster.gpu.memory, num_iterations)


@pytest.fixture
def config():
    return tiny_run(training={"global_batch_size": 8})


def test_ten_layouts_are_shown_fastest_first_each_with_its_limit(config):
    facts, lines = lines_of(config)
    shown = [line for line in lines if line.lstrip()[:1].isdigit() and "layout of the file" not in line][1:]
    assert len(shown) == min(10, len(facts["fits"]))
    for one, line in zip(facts["fits"], shown, strict=False):
        assert f"{one['seconds']:.3f}s" in line
        assert one["name"] in line
        assert one["limit"] != "products"
        assert one["spent"][one["limit"]] == max(v for k, v in one["spent"].items() if k != "products")


def test_names_say_what_a_layout_is(config):
    names = {one["name"] for one in lines_of(config)[0]["fits"]}
    assert "TP 1 x PP 1 x DP 4, micro-batch 1" in names
    assert "TP 1 x PP 2 x VPP 2 x DP 2, micro-batch 1" in names
    assert "TP 1 x PP 1 x CP 2 x DP 2, micro-batch 1" in names


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("Et*3|tL", "TP 1 x PP 2 x DP 2, micro-batch 1, layers 3 + 1"),
        ("E|t*2|t|tL", "TP 1 x PP 2 x VPP 2 x DP 2, micro-batch 1, layers 0 + 2 + 1 + 1"),
    ],
)
def test_a_layout_of_the_file_is_named_by_its_layers(layout, name):
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": layout}
    config = tiny_run(
        training={"global_batch_size": 8}, parallel={**parallel, "overlap_p2p_comm": layout.count("|") > 1}
    )
    facts, lines = lines_of(config)
    assert facts["given"]["name"] == name
    assert all(one["settings"]["parallel.pipeline_model_parallel_layout"] is None for one in facts["fits"])
    assert "  parallel.pipeline_model_parallel_layout=null" in lines


def test_the_layout_of_the_file_is_compared_with_the_first(config):
    facts, lines = lines_of(config)
    (line,) = [line for line in lines if "the layout of the file" in line]
    assert facts["given"]["name"] in line
    assert "the first" in line


def test_a_file_whose_layout_does_not_fit_the_ranks_says_why(config):
    odd = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=6))
    lines = lines_of(odd)[1]
    assert any(line.startswith("the layout of the file") and "fix: choose 8" in line for line in lines)
    assert any("TP 1 x PP 1, micro-batch 1" in line and "global_batch_size=6" in line for line in lines)


def test_hours_are_shown_where_the_number_of_steps_is_known(config):
    facts, lines = lines_of(config, num_iterations=36000)
    hours = facts["fits"][0]["seconds"] * 10
    assert any(f"{hours:.1f}" in line and facts["fits"][0]["name"] in line for line in lines)
    assert not any("assumed: full of" in line for line in lines)


def test_settings_of_the_suggested_layout_can_be_pasted(config):
    facts, lines = lines_of(config)
    suggested = facts["suggested"]["settings"]
    first = f"  parallel.tensor_model_parallel_size={suggested['parallel.tensor_model_parallel_size']}"
    assert first in lines
    assert "  parallel.num_layers_in_first_pipeline_stage=null" in lines


def test_where_nothing_fits_the_smallest_are_named(config, monkeypatch):
    monkeypatch.setitem(GPUS, "A100", dataclasses.replace(GPUS["A100"], memory=10**9))
    lines = lines_of(config)[1]
    assert "  no layout fits 1 GB a rank" in lines
    assert any(line.startswith("  too large: ") and "GB of 1" in line for line in lines)


def test_what_is_assumed_is_said(config):
    text = "\n".join(lines_of(config)[1])
    for words in ("assumed, not measured", "TP and CP together stay inside a node", "selective recomputation"):
        assert words in text
