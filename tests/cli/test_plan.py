import json

import numpy as np
import pytest

from megatron_vlm.cli import plan as plan_verb
from megatron_vlm.config import TrainConfig, load_config
from megatron_vlm.data.plan.plan import build_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import EncodedSample, TextSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.data.text.tokenizer import load_tokenizer


def facts(project, *arguments):
    done = project.run("plan", "train.yaml", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_packing_is_what_train_will_do(project, tmp_path):
    found = facts(project)["data"]
    config = load_config(TrainConfig, project.config)
    plan = build_plan(PlanSettings.from_config(config), [ShardedDataset.open(project.folder / "shards")], tmp_path)
    for name in ("num_rows", "num_iterations", "num_samples", "num_tokens", "num_images", "utilisation"):
        assert found[name] == getattr(plan.summary, name)


def test_layout_and_stages_are_those_of_the_job(project):
    found = facts(project, "parallel.pipeline_model_parallel_size=2", "--world-size", "4", "--no-data")
    assert (found["data_parallel_size"], len(found["stages"])) == (2, 2)
    assert [stage["num_layers"] for stage in found["stages"]] == [2, 2]
    assert found["bubble"] == pytest.approx(1 / 3)


def test_stage_with_the_tower_does_more_of_the_work(project):
    data = facts(project, "parallel.pipeline_model_parallel_size=2")["data"]
    assert sum(data["stage_fractions"]) == pytest.approx(1)
    assert data["stage_imbalance"] == pytest.approx(2 * max(data["stage_fractions"]) - 1)


def test_hours_follow_from_the_share_of_the_peak(project):
    fast, slow = (facts(project, "--mfu", mfu)["data"] for mfu in ("0.5", "0.25"))
    assert slow["gpu_hours"] == pytest.approx(2 * fast["gpu_hours"])


def test_text_names_memory_packing_and_hours(project):
    done = project.run("plan", "train.yaml")
    assert done.returncode == 0
    for word in ("a rank", "GiB", "iterations", "of the positions used", "GPU hours on A100"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--mfu", "40"], 64, "argument --mfu: 40 is above 1"),
        (["--mfu", "0"], 64, "--mfu 0 means that the run never ends"),
        (["--world-size", "3", "parallel.pipeline_model_parallel_size=2"], 78, "3 ranks are not a multiple"),
        (["data.blend=[{path: nowhere}]"], 65, "nowhere"),
        (["data.blend=[{path: nowhere}]"], 65, "or plan without it: --no-data"),
        (["data.tokenizer=nowhere.model"], 78, "or plan without it: --no-data"),
        (["--balance", "2", "--no-data"], 64, "--balance needs the packed rows"),
        (["--balance", "2,x"], 64, "argument --balance: 'x' is not a whole number"),
        (["--layouts"], 64, "--layouts needs the number of ranks"),
        (["--layouts", "--world-size", "4", "--balance", "2"], 64, "--layouts prints no balance"),
        (["--nvlink", "300"], 64, "--nvlink only matters for --layouts"),
        (["--layouts", "--world-size", "4", "--infiniband", "0"], 64, "--infiniband 0 means that no step ever ends"),
        (["--balance", "3"], 64, "3 data-parallel ranks do not share training.global_batch_size=4 evenly"),
    ],
)
def test_wrong_input_is_one_line(project, arguments, code, message):
    done = project.run("plan", "train.yaml", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_memory_names_its_peak_and_what_libraries_take(project):
    found = facts(project, "--no-data")
    (stage,) = found["stages"]
    assert stage["total"] == stage["peak"] + found["libraries"]
    assert found["backend"] == "torch"
    text = project.run("plan", "train.yaml", "--no-data").stdout
    assert f"the fullest rank needs {stage['total'] / 1e9:.1f} GB" in text


def test_a_stage_that_holds_most_at_the_start_is_named(project):
    settings = ["training.precision=bf16", "training.recompute=full", "data.seq_length=64"]
    shards = ["training.global_batch_size=64", "--world-size", "64"]
    text = project.run("plan", "train.yaml", "--no-data", *settings, *shards).stdout
    assert "stage 0 holds most at the start, when its weights stand twice" in text


@pytest.mark.parametrize("data", [[], ["--no-data"]])
def test_layouts_are_ranked(project, data):
    found = facts(project, "--layouts", "--world-size", "4", *data)
    seconds = [one["seconds"] for one in found["fits"]]
    assert seconds == sorted(seconds)
    assert (found["num_iterations"] is None) == bool(data)
    assert found["row"]["num_images"] > 0
    text = project.run("plan", "train.yaml", "--layouts", "--world-size", "4", *data).stdout
    assert text.index(found["fits"][0]["name"]) < text.index(found["fits"][1]["name"])
    assert ("hours" in text) == (not data)


def test_faster_links_make_exchanges_faster(project):
    def exchange(speed):
        found = facts(project, "--layouts", "--world-size", "4", "--no-data", "--nvlink", speed, "--gpus-per-node", "2")
        two = [one for one in found["fits"] if one["settings"]["parallel.tensor_model_parallel_size"] == 2]
        return two[0]["spent"]["tensor_parallel"]

    assert exchange("900") < exchange("9")


def test_data_that_is_not_there_can_be_left_out(project):
    assert "data" not in facts(project, "data.blend=[{path: nowhere}]", "--no-data")


def test_neighbouring_row_lengths_are_compared(project):
    data = facts(project)["data"]
    lengths = [row["seq_length"] for row in data["row_lengths"]]
    assert load_config(TrainConfig, project.config).data.seq_length in lengths
    assert data["best_row_length"] in lengths
    assert "<- wastes least" in project.run("plan", "train.yaml").stdout


def test_without_packing_no_row_length_is_better(project):
    assert "row_lengths" not in facts(project, "data.packing=false")["data"]


def test_balance_is_compared_with_random_order(project):
    found = facts(project, "--balance", "2,4")["data"]["balance"]
    assert [(row["load"], row["data_parallel_size"]) for row in found] == [
        ("images", 2),
        ("attention work", 2),
        ("images", 4),
        ("attention work", 4),
    ]
    assert all(row["lower_bound"] - 1e-9 <= row["planned"] for row in found)
    text = project.run("plan", "train.yaml", "--balance", "2").stdout
    assert "attention work on 2 ranks" in text
    assert "random order" in text


def test_clustering_shows_how_long_the_rows_are(project):
    text = project.run(
        "plan", "train.yaml", "data.packing=false", "data.length_clustering=true", "data.length_multiple=8"
    ).stdout
    assert "as long as each global batch needs" in text


def test_tokens_per_image_are_shown_where_they_vary(project):
    found = facts(project)
    tokens = load_config(TrainConfig, project.config).model.constant_image_tokens
    assert (found["data"]["fewest_image_tokens"], found["data"]["most_image_tokens"]) == (tokens, tokens)
    assert "tokens per image" not in "\n".join(plan_verb._lines(found, "A100"))
    found["data"] |= {"fewest_image_tokens": 16, "most_image_tokens": 900}
    assert "16 to 900 tokens per image, depending on its size" in plan_verb._lines(found, "A100")


def test_samples_of_which_a_cut_leaves_nothing_to_train_are_counted(project):
    tokenizer = load_tokenizer(project.folder / "tokenizer.model")
    question, answer = (np.full(size, 5, dtype=np.int32) for size in (200, 9))
    long = EncodedSample((TextSegment(question, False), TextSegment(answer, True)))
    short = EncodedSample((TextSegment(answer, False), TextSegment(answer, True)))
    for name, samples in (("long", [long, long]), ("mixed", [long, short, long])):
        write_dataset(project.folder / name, samples, dataset_name=name, tokenizer=tokenizer.facts)
    settings = ("data.seq_length=128", "data.blend=[{path: mixed}, {path: shards}]")
    assert facts(project, *settings)["data"]["nothing_to_train"] == [2, 0]
    done = project.run("plan", "train.yaml", *settings)
    assert "2 left out because the cut leaves them nothing to train" in done.stdout
    assert "nothing to train" not in project.run("plan", "train.yaml").stdout
    for verb in ("plan", "train"):
        done = project.run(verb, "train.yaml", "data.seq_length=128", "data.blend=[{path: long}]")
        assert done.returncode == 78
        (line,) = (line for line in done.stderr.splitlines() if "error" in line)
        assert "blend entry long has nothing to train" in line
