import json
from pathlib import Path

import pytest

from tests.support.played_ranks import HAS_GUARD, needs_fake_device

pytestmark = needs_fake_device

VILA = Path(__file__).parents[2] / "examples" / "vila_7b"
TIMEOUT = 600  # the machine may have other work
TWO_BY_TWO = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")


@pytest.fixture(scope="module")
def facts(project):
    """What a rehearsal of 4 ranks prints as JSON."""
    options = ("training.precision=bf16", "--world-size", "4", "--iterations", "1", "--json")
    done = project.run("rehearse", "train.yaml", "parallel.pipeline_model_parallel_size=2", *options, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_ranks_of_each_group_are_played_on_the_rows_of_the_run(facts):
    assert facts["played_ranks"] == [0, 1, 2, 3]
    assert facts["rows"] == "shards"
    by_rank = {rank["rank"]: rank["images"] for rank in facts["ranks"]}
    assert by_rank[0] == by_rank[2] != by_rank[1] == by_rank[3]


def test_parameters_gradients_and_optimizer_are_those_of_the_plan(facts):
    for stage in facts["stages"]:
        for name in ("weights", "gradients", "optimizer"):
            # The allocator rounds each of some hundred small tensors up to 512 bytes.
            assert stage[name] == pytest.approx(stage["plan"][name], rel=0.25), name
        assert stage["fits"]


def test_groups_and_messages_between_stages_are_compared(facts):
    assert not facts["differences"]
    compared = {(one["group"], tuple(one["ranks"]), one["messages"]): one["calls"] for one in facts["compared"]}
    for ranks in ((0, 1), (2, 3)):
        assert compared["data parallel with cp", ranks, False] > 1
    for ends in ((0, 2), (2, 0), (1, 3), (3, 1)):
        assert compared["pipeline model parallel", ends, True] == facts["num_micro_batches"]


def test_waits_of_the_host_have_file_and_line(facts):
    waits = {wait["where"]: wait["count"] for wait in facts["stages"][1]["waits"]}
    (totals,) = [count for where, count in waits.items() if where.startswith("megatron_vlm/training/totals.py:")][-1:]
    assert totals == 1


def test_host_waits_for_the_device_at_most_three_times_a_step(facts):
    # In bf16: float32 attention has no kernel for packed samples on a GPU and splits them on the host.
    counts = {rank["rank"]: sum(wait["count"] for wait in rank["waits"]) for rank in facts["ranks"]}
    assert max(counts.values()) <= 3, facts["ranks"]


def test_text_has_memory_waits_and_collectives(project):
    done = project.run("rehearse", "train.yaml", "--world-size", "1", "data.blend=[{path: nowhere}]", timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    for words in ("[MiB; in brackets: plan]", "A100 has 74.5 GiB", "rows are made up", "waits for the device"):
        assert words in done.stdout
    assert "no two played ranks share a group" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--world-size", "3", *TWO_BY_TWO], 78, "3 ranks are not a multiple"),
        (["--world-size", "4", "--ranks", "1,4"], 64, "--ranks names 4, the job has ranks 0 to 3; fix: name ranks"),
        (["--world-size", "4", "--ranks", "x"], 64, "argument --ranks: 'x' is not a whole number"),
        ([], 64, "--world-size"),
    ],
)
def test_wrong_input_is_one_line(project, arguments, code, message):
    done = project.run("rehearse", "train.yaml", *arguments, timeout=TIMEOUT)
    (line,) = done.stderr.splitlines()
    assert done.returncode == code
    assert message in line


@pytest.mark.skipif(HAS_GUARD, reason="this torch has a guard for CUDA of its own")
def test_without_a_compiler_one_line_says_so(project, tmp_path):
    variables = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    done = project.run("rehearse", "train.yaml", "--world-size", "1", timeout=TIMEOUT, **variables)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 78
    assert "needs a C++ compiler once" in line


def test_job_that_does_not_fit_is_refused_with_the_setting_to_change(project):
    wide = ("model.language.hidden_size=16384", "model.language.ffn_hidden_size=65536")
    done = project.run(
        "rehearse",
        "train.yaml",
        "--world-size",
        "2",
        "--ranks",
        "0",
        "--iterations",
        "1",
        "--no-data",
        *wide,
        timeout=TIMEOUT,
    )
    *_, line = done.stderr.splitlines()
    assert done.returncode == 78
    assert "stage 0 needs" in line
    assert "parallel.tensor_model_parallel_size=2" in line
    assert "rows are made up" in done.stdout


WORLD_SIZES = {"h100": 64, "lora": 8}
EXAMPLES = [
    (path, WORLD_SIZES.get(path.parent.name, WORLD_SIZES.get(path.stem, 128)))
    for path in sorted(VILA.rglob("*.yaml"))
    if path.stem != "base"
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "world_size"), EXAMPLES, ids=lambda value: str(value).rpartition("vila_7b/")[2])
def test_example_fits_agrees_and_holds_what_plan_says(project, path, world_size):
    done = project.run("rehearse", str(path), "--world-size", str(world_size), "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert not facts["differences"]
    for stage in facts["stages"]:
        assert stage["peak"] < 80e9
        assert stage["plan"]["peak"] == pytest.approx(stage["peak"], rel=0.1)
        assert stage["plan"]["activations"] == pytest.approx(stage["activations"], rel=0.1)
        # One for the log line; the host decides nothing else by what the device computes.
        assert sum(wait["count"] for wait in stage["waits"]) <= 3
