"""Files that run code where they are unpickled without restrictions: their canary is a file that appears."""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

from megatron_vlm.checkpoint.manifest import checksum_file, list_files, read_manifest, write_manifest


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def touching(canary: Path) -> Call:
    """Return what is pickled as a command that creates `canary`."""
    return Call(os.system, f"touch {canary}")


def write_hostile_index(checkpoint: Path, canary: Path) -> None:
    """Replace the index by a pickle that names one function below torch.distributed.checkpoint; the manifest fits."""
    payload = checkpoint.parent.parent / "payload.pt"
    torch.save({"state": touching(canary)}, payload)
    hostile = Call(torch_save_to_dcp, str(payload), str(payload.with_name("out")))
    replace_file(checkpoint, ".metadata", pickle.dumps(hostile))


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Write a file of a checkpoint and its record in the manifest."""
    (checkpoint / name).write_bytes(content)
    files = {name: checksum_file(checkpoint / name) for name in list_files(checkpoint)}
    write_manifest(checkpoint, dataclasses.replace(read_manifest(checkpoint), files=files))
