"""Make one dataset of finished pieces: the parts of `prepare`, or the datasets of a job array."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import DataError
from megatron_vlm.data.prepare.part import PartFacts
from megatron_vlm.data.rejects import describe_rejects
from megatron_vlm.data.shards.manifest import REJECTS_FILE, Manifest, facts_of_file
from megatron_vlm.platform.files.durable import open_durably


def join_facts(
    plan: Manifest, pieces: Sequence[PartFacts | Manifest], folders: Sequence[Path], rejects: Path
) -> Manifest:
    """Write the list of rejects of all pieces and return the manifest of the whole; may be done again.

    Args:
        plan: what was known before any data was read.
        pieces: in order.
        folders: of the pieces.
        rejects: where the list goes.
    """
    reasons, notes = Counter[str](), Counter[str]()
    for piece in pieces:
        reasons.update(piece.rejects)
        notes.update(piece.notes)
    with open_durably(rejects) as stream:
        for folder in folders:
            with (folder / REJECTS_FILE).open("rb") as own:
                shutil.copyfileobj(own, stream)
    shards = [shard for piece in pieces for shard in piece.shards]
    return dataclasses.replace(
        plan,
        shards=tuple(dataclasses.replace(shard, name=f"{number:05d}") for number, shard in enumerate(shards)),
        documents=sum(piece.documents for piece in pieces),
        rejects=dict(sorted(reasons.items())),
        notes=dict(sorted(notes.items())),
        rejects_file=facts_of_file(rejects),
    )


def check_not_empty(manifest: Manifest, where: Path) -> None:
    """Refuse a dataset without a sample.

    Raises:
        DataError: no document became a sample.
    """
    if not manifest.shards:
        raise DataError(
            f"none of {manifest.documents} documents became a sample: "
            f"{describe_rejects(manifest.rejects) or 'the input is empty'}",
            where=str(where),
            fix="look at the rejects, then delete the folder and try with other options",
        )
