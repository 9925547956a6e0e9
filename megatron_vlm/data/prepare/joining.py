"""Make one manifest of several: of the chunks of one preparation, or of the datasets of a job array."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import DataError
from megatron_vlm.data.prepare.chunk import ChunkFacts
from megatron_vlm.data.rejects import describe_rejects
from megatron_vlm.data.shards.manifest import REJECTS_FILE, Manifest, ShardFacts, facts_of_file
from megatron_vlm.platform.files.durable import open_durably


def join_facts(
    bare: Manifest, finished: Sequence[ChunkFacts | Manifest], folders: Sequence[Path], rejects: Path
) -> Manifest:
    """Write one list of rejects and return the manifest of the whole dataset; calling this again is harmless.

    Args:
        bare: the manifest as far as it is known before any data is read.
        finished: facts of each chunk or dataset, in order.
        folders: their folders.
        rejects: file for the list of rejects.
    """
    reasons, notes = Counter[str](), Counter[str]()
    for facts in finished:
        reasons.update(facts.rejects)
        notes.update(facts.notes)
    with open_durably(rejects) as stream:
        for folder in folders:
            with (folder / REJECTS_FILE).open("rb") as own:
                shutil.copyfileobj(own, stream)
    return dataclasses.replace(
        bare,
        shards=number_shards([shard for facts in finished for shard in facts.shards]),
        documents=sum(facts.documents for facts in finished),
        rejects=dict(sorted(reasons.items())),
        notes=dict(sorted(notes.items())),
        rejects_file=facts_of_file(rejects),
    )


def number_shards(shards: Sequence[ShardFacts]) -> tuple[ShardFacts, ...]:
    """Name the shards by their numbers, from 00000."""
    return tuple(dataclasses.replace(shard, name=f"{number:05d}") for number, shard in enumerate(shards))


def check_not_empty(manifest: Manifest, rejects: Path) -> None:
    """Raise a DataError that names the list of rejects if no document became a sample."""
    if not manifest.shards:
        why = describe_rejects(manifest.rejects) or "the input is empty"
        raise DataError(
            f"none of {manifest.documents} documents became a sample: {why}",
            where=str(rejects),
            fix="look at the rejects, then delete the folder and try other options",
        )
