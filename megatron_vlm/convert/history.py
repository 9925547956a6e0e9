"""What run folders tell about how a checkpoint was trained, from its first stage to its last."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.manifest import read_manifest
from megatron_vlm.config import CheckpointError, DataError
from megatron_vlm.config.yaml_text import read_yaml
from megatron_vlm.data.shards.manifest import load_manifest
from megatron_vlm.platform.files.metrics import Record, read_metrics
from megatron_vlm.platform.files.run_folder import CONFIG_NAME

_NUM_AVERAGED = 20
"""Iterations at the end of a stage whose losses are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset of a stage."""

    name: str
    """As its manifest has it; the name of its folder if there is no manifest any more."""
    used: str
    """How much of it, in the words of the config, e.g. "epochs 2"."""
    samples: int | None
    """Samples in it; None: it is not there any more."""
    images: int | None
    text_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of the chain, up to the checkpoint that was taken from it."""

    name: str
    iterations: int
    rows: int | None
    """Consumed rows, each with one sample or several; None: the checkpoint does not say."""
    tokens: int | None
    """Of text and images, repetitions included; None: the run folder has no metrics.jsonl."""
    images: int | None
    learned: str
    """What learned: `all`, or what did not."""
    losses: Mapping[str, float]
    """Mean over the last iterations by name, those of datasets and validation among them; empty without metrics."""
    datasets: tuple[Dataset, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The stages of a checkpoint."""

    stages: tuple[Stage, ...] = ()
    """Oldest first."""
    is_complete: bool = True
    """False: the weights that the first of them started from are not there any more."""


def read_history(checkpoint: Path) -> History:
    """Follow `checkpoint.load_weights` from a checkpoint back to the first stage.

    Runs are looked for where the settings name them, and beside the run that names them. A checkpoint that was imported
    or has no settings of a training is the beginning.
    """
    stages: list[Stage] = []
    seen: set[Path] = set()
    place: Path | None = checkpoint
    while place is not None and place.resolve() not in seen:
        seen.add(place.resolve())
        settings = _read_settings(place)
        if "stage" not in settings:
            return _oldest_first(stages, is_complete=True)
        stages.append(_read_stage(place, settings))
        source = _section(settings, "checkpoint").get("load_weights")
        if source is None:
            return _oldest_first(stages, is_complete=True)
        place = _find_source(place, str(source))
    return _oldest_first(stages, is_complete=False)


def _oldest_first(stages: list[Stage], *, is_complete: bool) -> History:
    return History(stages=tuple(reversed(stages)), is_complete=is_complete)


def _read_settings(checkpoint: Path) -> dict[str, Any]:
    try:
        found = read_yaml((checkpoint / CONFIG_NAME).read_text())[0]
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _find_source(checkpoint: Path, source: str) -> Path | None:
    runs = checkpoint.resolve().parent.parent.parent
    for place in (Path(source), runs / Path(source).name):
        try:
            return find_checkpoint(place)
        except CheckpointError:
            continue
    return None


def _read_stage(checkpoint: Path, settings: dict[str, Any]) -> Stage:
    manifest = read_manifest(checkpoint)
    metrics = read_metrics(checkpoint.parent.parent)
    records = [record for record in metrics if record["iteration"] <= manifest.iteration]
    frozen = _section(settings, "training").get("freeze") or ()
    blend = _section(settings, "data").get("blend") or ()
    return Stage(
        name=str(settings["stage"]),
        iterations=manifest.iteration,
        rows=manifest.progress.get("consumed_samples"),
        tokens=_total(records, "tokens"),
        images=_total(records, "images"),
        learned=f"all but {', '.join(map(str, frozen))}" if frozen else "all",
        losses=dict(_losses(records)),
        datasets=tuple(_read_dataset(entry) for entry in blend if isinstance(entry, dict)),
    )


def _total(records: list[Record], key: str) -> int | None:
    return sum(int(record.get(key) or 0) for record in records) if records else None


def _losses(records: list[Record]) -> Iterator[tuple[str, float]]:
    """Yield the mean of each loss over the last iterations; of validation losses, which are rare, the last one."""
    names = dict.fromkeys(key for record in records for key in record)
    for name in names:
        if name == "loss" or name.startswith("loss/"):
            found = (record.get(name) for record in records[-_NUM_AVERAGED:])
            if values := [value for value in found if isinstance(value, float) and math.isfinite(value)]:
                yield name, math.fsum(values) / len(values)
        elif name.startswith("validation_loss"):
            yield name, next(value for record in reversed(records) if (value := record.get(name)) is not None)


def _read_dataset(entry: Mapping[str, Any]) -> Dataset:
    path = Path(str(entry.get("path")))
    kinds = ("weight", "epochs", "images")
    used = next((f"{kind} {entry[kind]:g}" for kind in kinds if entry.get(kind) is not None), "epochs 1")
    try:
        manifest = load_manifest(path)
    except DataError:
        return Dataset(name=path.name, used=used, samples=None, images=None, text_tokens=None)
    counts = manifest.counts
    return Dataset(
        name=manifest.dataset_name,
        used=used,
        samples=counts.samples,
        images=counts.images,
        text_tokens=counts.text_tokens,
    )
