"""An image that cannot be read costs a run that image, not its text and not the run; too many of them stop it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlm.config import BlendEntry, DataError
from megatron_vlm.data.loading.batch import BadImage
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.training.bad_samples import BadSamples
from megatron_vlm.training.blend import open_validation_blend
from megatron_vlm.training.step import train_step
from megatron_vlm.training.validation import validation_losses
from tests.support.blended_runs import open_run
from tests.support.jobs import CPU
from tests.support.runs import TOKENIZER, read_metrics, shard_run
from tests.support.samples import make_samples

NAMES = ("coyo", "mmc4")


def dataset(name, size):
    class Stub(SimpleNamespace):
        def __len__(self):
            return size

    return Stub(fingerprint=name, manifest=SimpleNamespace(dataset_name=name))


def account(run_dir, iteration=0, fraction=0.1):
    return BadSamples(run_dir, fraction, [dataset("coyo", 40), dataset("mmc4", 10)], iteration)


def bad(sample_id, entry=0, image=0, folder="d"):
    where = f"{folder}/00000.bin sample {sample_id}"
    return BadImage(sample_id=sample_id, dataset=entry, where=where, image=image, reason="not a JPEG")


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


def test_every_image_is_listed_and_its_sample_counted_once(one_rank, tmp_path):
    samples = account(tmp_path)
    samples.note([bad(7), bad(7, image=2), bad(3)], NAMES, 5)
    samples.note([bad(7), bad(41, entry=1)], NAMES, 9)  # 7 in another pass
    assert samples.counts == {"coyo": 2, "mmc4": 1}
    assert [(line["iteration"], line["sample_id"], line["image"]) for line in lines(tmp_path)] == [
        (5, 3, 0),
        (5, 7, 0),
        (5, 7, 2),
        (9, 41, 0),
    ]
    first = {"dataset": "coyo", "sample": "d/00000.bin sample 3", "reason": "not a JPEG"}
    assert first.items() <= lines(tmp_path)[0].items()


def test_a_resumed_run_counts_as_one_that_was_not_stopped(one_rank, tmp_path):
    samples = account(tmp_path)
    for iteration, sample_id in ((2, 1), (4, 2), (6, 3)):
        samples.note([bad(sample_id)], NAMES, iteration)
    resumed = account(tmp_path, iteration=4)
    assert resumed.counts == {"coyo": 2}
    resumed.note([bad(1, folder="moved"), bad(3, folder="moved")], NAMES, 6)
    assert resumed.counts == samples.counts
    assert [line["sample_id"] for line in lines(tmp_path)] == [1, 2, 3]


def test_damaged_lines_are_no_samples(one_rank, tmp_path):
    account(tmp_path).note([bad(1)], NAMES, 1)
    with (tmp_path / "bad_samples.jsonl").open("a") as stream:
        stream.write('{"iteration": 1}\n{"iteration": 1, "dataset": [1], "sample": "x"}\n{"iteration": 2, "da')
    assert account(tmp_path, iteration=2).counts == {"coyo": 1}


def test_more_than_the_fraction_of_a_dataset_stops_the_run(one_rank, tmp_path):
    samples = account(tmp_path)
    samples.note([bad(number) for number in range(4)], NAMES, 1)  # 4 of 40
    with pytest.raises(DataError) as caught:
        samples.note([bad(41, entry=1), bad(42, entry=1)], NAMES, 2)  # 2 of 10
    assert "2 of 10 samples of mmc4 have unreadable images, data.max_bad_fraction is 0.1" in str(caught.value)
    assert caught.value.exit_code == 65
    assert len(lines(tmp_path)) == 6


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory):
    """The datasets of `shards`, with two of the images of each changed.

    In `bad`, one is no image, and a byte of the other is flipped on the disk; in `blank`, both are of the mean colour.
    """
    folder = tmp_path_factory.mktemp("damaged")
    samples = [placed.sample for placed in make_samples(40)]
    for kind in ("bad", "blank"):
        (folder / kind).mkdir()
        shutil.copy(shards / "tokenizer.model", folder / kind)
        for name, own in (("coyo", samples[:25]), ("mmc4", samples[25:])):
            changed = list(own)
            for place, content in zip(places_of(own), (b"no image", None), strict=True):
                changed[place] = replace_first_image(own[place], blank_image() if kind == "blank" else content)
            write_dataset(folder / kind / name, changed, dataset_name=name, tokenizer=TOKENIZER)
    for name, own in (("coyo", samples[:25]), ("mmc4", samples[25:])):
        flip(folder / "bad" / name / "00000.bin", first_image(own[places_of(own)[1]]))
    return folder


def places_of(samples):
    return [place for place, sample in enumerate(samples) if first_image(sample) is not None][:2]


def first_image(sample):
    return next((part.encoded for part in sample.segments if isinstance(part, ImageSegment)), None)


def replace_first_image(sample, content):
    if content is None:
        return sample
    segments = list(sample.segments)
    place = next(place for place, part in enumerate(segments) if isinstance(part, ImageSegment))
    segments[place] = ImageSegment(content, (32, 32))
    return EncodedSample(tuple(segments))


def blank_image():
    import io

    from PIL import Image

    from tests.support.configs import tiny_model

    stream = io.BytesIO()
    colour = tuple(int(channel * 255) for channel in tiny_model().vision.image_mean)
    Image.new("RGB", (32, 32), colour).save(stream, "PNG")
    return stream.getvalue()


def flip(path, content):
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 4
    path.write_bytes(bytes(data))


def open_whole(shards, run_dir, fraction):
    """Return a run whose first step has all samples, and its data."""
    training = {"global_batch_size": 20, "train_iters": 1}
    state, blend = open_run(shards, run_dir, data={"max_bad_fraction": fraction}, training=training)
    state.bad_samples = BadSamples(run_dir, fraction, blend.datasets, 0)
    return state, blend


def test_a_step_is_that_of_blank_images_in_their_place(one_rank, damaged, tmp_path):
    measured = []
    for kind in ("blank", "bad"):
        state, blend = open_whole(damaged / kind, tmp_path / kind, 0.2)
        metrics = train_step(state, blend.start_loaders(state, CPU, 0), device=CPU, stop_requested=False)
        measured.append((metrics.loss, metrics.grad_norm, metrics.num_labels, metrics.num_images))
    assert measured[0] == measured[1]
    assert not (tmp_path / "blank" / "bad_samples.jsonl").exists()
    assert state.bad_samples.counts == {"coyo": 2, "mmc4": 2}
    reasons = [line["reason"] for line in lines(tmp_path / "bad")]
    assert sum("not a JPEG" in reason for reason in reasons) == 2
    assert sum("checksum" in reason for reason in reasons) == 2


def test_too_many_end_the_run_before_the_update(one_rank, damaged, tmp_path):
    state, blend = open_whole(damaged / "bad", tmp_path, 0.1)
    before = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    with pytest.raises(DataError, match="2 of 15 samples of mmc4"):
        train_step(state, blend.start_loaders(state, CPU, 0), device=CPU, stop_requested=False)
    assert all(torch.equal(before[name], value) for name, value in state.chunks[0].named_parameters())


def test_with_fraction_0_the_first_one_ends_the_run(one_rank, damaged, tmp_path):
    state, blend = open_whole(damaged / "bad", tmp_path, 0.0)
    with pytest.raises(DataError, match=r"(checksum|not a JPEG).*\.bin sample"):
        train_step(state, blend.start_loaders(state, CPU, 0), device=CPU, stop_requested=False)


def test_a_validation_lists_what_it_meets_too(one_rank, damaged, tmp_path):
    losses = []
    for kind in ("blank", "bad"):
        validation = tuple(BlendEntry(path=str(damaged / kind / name)) for name in NAMES)
        state, blend = open_run(
            damaged / kind,
            tmp_path / kind,
            data={"max_bad_fraction": 0.2, "validation": validation},
            training={"validation_interval": 1},
        )
        state.bad_samples = BadSamples(tmp_path / kind, 0.2, blend.datasets, 0)
        held_out = open_validation_blend(state.config)
        losses.append(validation_losses(state, held_out, device=CPU, stop_requested=lambda: False))
    assert losses[0] == losses[1]
    assert state.bad_samples.counts == {"coyo": 2, "mmc4": 2}


def damaged_run(shards, run_dir, *, workers, exit_iteration=None, **parallel):
    return shard_run(
        shards,
        run_dir,
        data={"num_workers": workers, "max_bad_fraction": 0.2},
        parallel=parallel,
        training={"exit_iteration": exit_iteration, "global_batch_size": 4},
    )


@pytest.mark.distributed
def test_layout_workers_and_a_restart_change_neither_list_nor_losses(workers, damaged, tmp_path):
    job = "megatron_vlm.training.run:run_training"
    layout = {"tensor_model_parallel_size": 2}
    workers.run(job, 1, config=damaged_run(damaged / "bad", tmp_path / "one", workers=0))
    workers.run(job, 2, config=damaged_run(damaged / "bad", tmp_path / "two", workers=1, exit_iteration=3, **layout))
    workers.run(job, 2, config=damaged_run(damaged / "bad", tmp_path / "two", workers=0, **layout))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert one[-1]["bad_samples/coyo"] >= 1
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    for name in ("sample_ids_sha", "tokens", "labels", "images", "bad_samples/coyo", "bad_samples/mmc4"):
        assert [line.get(name) for line in two] == [line.get(name) for line in one], name
    # float32: every layout adds the same numbers up in another order.
    assert np.allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
