"""The numbers of a real run on two ranks that stops and goes on, against figures counted from its samples."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.platform.files.events import read_events
from megatron_vlm.training.blend import open_planned_blend
from megatron_vlm.training.run_records import read_run
from tests.support.runs import read_metrics, shard_run
from tests.support.samples import make_samples

pytestmark = pytest.mark.distributed
SIZES = {"coyo": 25, "mmc4": 15}


@pytest.fixture(scope="module")
def finished(workers, shards, tmp_path_factory):
    """The settings of a run of 6 iterations that stopped after 4 and lost none."""
    run_dir = tmp_path_factory.mktemp("numbers")
    for training in ({"exit_iteration": 4}, {}):
        config = shard_run(shards, run_dir, training=training, checkpoint={"save_interval": 2})
        workers.run("megatron_vlm.training.run:run_training", 2, config=config)
    return config


def sizes_of(sample, config) -> tuple[int, int]:
    """Return the tokens and the images of a sample."""
    image = config.model.num_image_tokens(*[config.model.vision.image_size] * 2)
    segments = sample.segments
    tokens = sum(image if isinstance(one, ImageSegment) else len(one.input_ids) for one in segments)
    return tokens, sum(isinstance(one, ImageSegment) for one in segments)


def test_numbers_are_those_of_the_samples(finished):
    plan, lines = open_planned_blend(finished).plan, read_metrics(finished.run_dir)
    sizes = [sizes_of(placed.sample, finished) for placed in make_samples(40)]
    seen_samples, seen_tokens = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
    assert [line["iteration"] for line in lines] == list(range(1, 7))
    for index, line in enumerate(lines):
        ids, samples_per_row = plan.rows(index)
        rows = np.split(ids, np.cumsum(samples_per_row)[:-1])
        tokens = {"coyo": sum(sizes[i][0] for i in ids if i < 25), "mmc4": sum(sizes[i][0] for i in ids if i >= 25)}
        images = [sum(sizes[i][1] for i in row) for row in rows]  # one row for each rank
        assert line["tokens"] == sum(tokens.values())
        assert (line["tokens/coyo"], line["tokens/mmc4"]) == (tokens["coyo"], tokens["mmc4"])
        assert line["images"] == sum(images)
        assert line["image_imbalance"] == pytest.approx(max(images) / (sum(images) / 2))
        assert line["padding"] == pytest.approx(1 - line["tokens"] / (2 * finished.data.seq_length))
        for name in SIZES:
            seen_samples[name] += sum((i < 25) == (name == "coyo") for i in ids)
            seen_tokens[name] += tokens[name]
            assert line[f"passes/{name}"] == pytest.approx(seen_samples[name] / SIZES[name])
            assert line[f"seen_tokens/{name}"] == seen_tokens[name]
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
        assert line["data_wait_fraction"] == pytest.approx(line["data_wait"] / line["seconds"])


def test_phases_make_up_the_step(finished):
    for line in read_metrics(finished.run_dir):
        phases = {key: value for key, value in line.items() if key.startswith("seconds/")}
        assert math.fsum(phases.values()) == pytest.approx(line["seconds"], rel=0.05)
        assert min(phases["seconds/forward_backward"], phases["seconds/optimizer"]) > 0
        assert phases["seconds/gradient_reduction"] > 0


def test_the_time_of_both_attempts_is_told(finished):
    events, _ = read_events(finished.run_dir)
    assert [(event.kind, event.iteration) for event in events] == [
        ("begin", 0),
        ("save", 2),
        ("save", 4),
        ("begin", 4),
        ("save", 6),
    ]
    assert all(event.seconds() > 0 for event in events if event.kind == "save")
    spent, lines = read_run(Path(finished.run_dir)).time_spent, read_metrics(finished.run_dir)
    assert spent.steps == pytest.approx(math.fsum(line["seconds"] for line in lines))
    assert spent.save == pytest.approx(math.fsum(event.seconds() for event in events))
    assert spent.total == pytest.approx(events[-1].unix_time - events[0].unix_time)
    assert spent.restart == pytest.approx(events[3].unix_time - events[2].unix_time)
    last = lines[-1]
    passed = last["unix_time"] - events[0].unix_time
    assert last["goodput"] == pytest.approx(spent.steps / passed)
