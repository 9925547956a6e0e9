"""List what a global batch of a run holds: `megatron-vlm data inspect RUN --iteration N`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_vlm.config import ConfigError, DataError, TrainConfig, UsageError, load_config
from megatron_vlm.data.images.formats import find_format
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.inspection import BatchSample, read_batch
from megatron_vlm.data.plan.ledger import read_iteration
from megatron_vlm.data.plan.plan import Plan
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.page import read_text, render_samples
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.platform.files.durable import storage_errors, write_durably
from megatron_vlm.platform.files.run_folder import CONFIG_NAME, LEDGER_FOLDER
from megatron_vlm.training.blend import open_planned_blend


def list_batch(
    run_dir: Path, iteration: int, *, tokenizer: str | None, with_text: bool, pictures: Path | None, page: Path | None
) -> Iterator[str]:
    """Yield lines about the samples of an iteration; write pictures and a page on request.

    Args:
        run_dir: the run folder.
        iteration: counted from 1.
        tokenizer: in place of the run's own.
        with_text: whether the text of each sample follows it.
        pictures: folder for the images, as the shards hold them.
        page: HTML file.

    Raises:
        ConfigError: the folder is not that of a run.
        DataError: the plan or a sample is missing or damaged, or the ledger has other samples.
        UsageError: the run has no such iteration.
    """
    if not (run_dir / CONFIG_NAME).is_file():
        raise ConfigError(f"folder has no {CONFIG_NAME}", where=str(run_dir), fix="name the folder of a run")
    config = load_config(TrainConfig, str(run_dir / CONFIG_NAME), [])
    # The folder may have been moved since.
    blend = open_planned_blend(dataclasses.replace(config, run_dir=str(run_dir)))
    plan = blend.plan
    if iteration > plan.num_iterations:
        raise UsageError(f"iteration {iteration} of {plan.num_iterations} does not exist", fix="give another")
    state = _compare_with_ledger(run_dir, plan, iteration)
    collation = Collation.from_config(config.model, config.data)
    samples = list(read_batch(blend.datasets, plan, iteration - 1, collation, blend.quarantine.ids))
    yield (
        f"iteration {iteration} of {plan.num_iterations}, {state}: {len(samples)} samples in "
        f"{plan.settings.global_batch_size} rows of {plan.seq_length(iteration - 1)} tokens, "
        f"{sum(len(sample.images) for sample in samples)} images, {sum(x.num_tokens for x in samples)} tokens, "
        f"{sum(x.num_labels for x in samples)} with a loss"
    )
    opened = load_tokenizer(tokenizer or run_dir) if with_text or page else None
    for sample in samples:
        yield _line(sample)
        if with_text and opened is not None:
            yield from (f"    {line}" for line in _text(sample, opened).splitlines())
    if pictures:
        yield f"wrote {_write_pictures(samples, pictures)} images to {pictures}"
    if page and opened is not None:
        named = ((_line(sample), f"sample-{sample.sample_id}", sample.sample) for sample in samples)
        text = render_samples(f"{run_dir}: iteration {iteration}", named, opened)
        write_durably(page, text.encode())
        yield f"wrote {page}"


def _compare_with_ledger(run_dir: Path, plan: Plan, iteration: int) -> str:
    recorded = read_iteration(run_dir / LEDGER_FOLDER, iteration)
    if recorded is None:
        return "not done yet"
    if not np.array_equal(recorded.sample_ids, plan.sample_ids(iteration - 1)):
        raise DataError(
            f"the ledger has other samples of iteration {iteration} than the plan of {CONFIG_NAME}",
            where=f"{run_dir}, plan {recorded.entry.plan} in the ledger, {plan.hash} now",
            fix=f"restore the {CONFIG_NAME} with which the iteration was done",
        )
    return "done"


def _line(sample: BatchSample) -> str:
    if sample.is_left_out:
        return f"row {sample.row}: id {sample.sample_id}, {sample.dataset} ({sample.where}), in quarantine"
    faults = [f"image {place}: {image.fault}" for place, image in enumerate(sample.images) if image.fault]
    return (
        f"row {sample.row}: id {sample.sample_id}, {sample.dataset} ({sample.where}), {sample.num_tokens} tokens, "
        f"{sample.num_labels} with a loss, {len(sample.images)} images" + "".join(f"; {fault}" for fault in faults)
    )


def _text(sample: BatchSample, tokenizer: Tokenizer) -> str:
    """Return the text of a sample, with images and control tokens by name."""
    parts: list[str] = []
    follows_text = False
    for segment in sample.sample.segments:
        if isinstance(segment, ImageSegment):
            parts.append("<image>")
        else:
            parts += [text for _, text in read_text(segment.input_ids, tokenizer, follows_text=follows_text)]
        follows_text = not isinstance(segment, ImageSegment)
    return "".join(parts)


def _write_pictures(samples: list[BatchSample], folder: Path) -> int:
    """Write images as `row_0000_id_12_0.jpg`, and return their number."""
    written = 0
    with storage_errors("images cannot be written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            for place, image in enumerate(sample.images):
                kind = find_format(image.encoded)
                name = f"row_{sample.row:04d}_id_{sample.sample_id}_{place}.{kind.extension if kind else 'bin'}"
                (folder / name).write_bytes(image.encoded)
                written += 1
    return written
