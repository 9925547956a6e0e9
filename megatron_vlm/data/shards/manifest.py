"""The manifest of a prepared dataset: what its shards hold, with sizes and checksums."""

import dataclasses
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.config import DataError
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.platform.files.durable import write_durably
from megatron_vlm.platform.files.run_folder import CONFIG_NAME

FORMAT_NAME = "megatron_vlm shards"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejects.jsonl"
SUFFIXES = ("bin", "idx", "crc", "dim")
"""The files of a shard."""
DUPLICATES_NOTE = "duplicate_samples"
"""The note that counts the samples dropped by `data dedupe`."""
WORK_FOLDER = ".prepare"
"""Where `prepare` keeps its unfinished parts, inside the output folder."""

_FIX_FOLDER = "give a folder that megatron-vlm prepare wrote"
_OWN_CHECKSUM = "crc32"
"""Of everything else in the manifest; those of earlier versions have none."""
_CHUNK_BYTES = 1 << 18  # larger chunks are no faster and would show up in the memory of every reader


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """Size and checksum of one file."""

    bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a shard or a whole dataset holds."""

    samples: int = 0
    sequences: int = 0
    """Text and image sequences."""
    images: int = 0
    image_bytes: int = 0
    text_tokens: int = 0
    """Tokens of all text, including BOS and EOS but not images."""
    trained_tokens: int = 0
    """Tokens of text sequences with a loss."""

    def __add__(self, other: "Counts") -> "Counts":
        names = (entry.name for entry in dataclasses.fields(self))
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """One shard: the files `name`.bin, `name`.idx, `name`.crc and `name`.dim."""

    name: str
    input: str
    """The input file that the samples come from."""
    counts: Counts
    files: dict[str, FileFacts]
    """By suffix; one for each of `SUFFIXES`."""

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "ShardFacts":
        """Read what `dataclasses.asdict` wrote as JSON.

        Raises:
            KeyError, TypeError: a field is missing or unknown, or is no number where one is meant.
        """
        _check_numbers(tree["counts"], *tree["files"].values())
        files = {suffix: FileFacts(**facts) for suffix, facts in tree["files"].items()}
        return cls(name=tree["name"], input=tree["input"], counts=Counts(**tree["counts"]), files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a prepared dataset except the samples."""

    dataset_name: str
    """Name under which the loss of this dataset is reported, e.g. "mmc4"."""
    tokenizer: TokenizerFacts
    shards: tuple[ShardFacts, ...]
    documents: int
    """Documents read: those that became samples and those rejected."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Rejected documents by reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Other counts, e.g. of animated images, of which only the first frame is used."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `prepare`."""
    rejects_file: FileFacts | None = None

    @property
    def counts(self) -> Counts:
        """The sum over the shards."""
        return sum((shard.counts for shard in self.shards), Counts())

    @property
    def rejected(self) -> int:
        """Documents that did not become a sample."""
        return sum(self.rejects.values())


def crc32_of_file(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def without_content(manifest: Manifest) -> Manifest:
    """Return the part of a manifest known before any data is read: what the dataset is made from, and how."""
    return dataclasses.replace(manifest, shards=(), documents=0, rejects={}, notes={}, rejects_file=None)


def facts_of_file(path: Path) -> FileFacts:
    """Return the size and checksum of a file."""
    return FileFacts(bytes=path.stat().st_size, crc32=crc32_of_file(path))


def fault_of_file(path: Path, facts: FileFacts) -> str | None:
    """Describe how a file differs from the manifest; None if it does not."""
    try:
        if not path.is_file():
            return "file is missing"
        if (found := path.stat().st_size) != facts.bytes:
            return f"{found} bytes, but the manifest says {facts.bytes}"
        return None if crc32_of_file(path) == facts.crc32 else "checksum differs from the manifest"
    except OSError as error:
        return f"file cannot be read: {error.strerror}"


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json`, the last file of a dataset: its presence means that the dataset is complete."""
    tree = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
    tree |= dataclasses.asdict(manifest) | {"counts": dataclasses.asdict(manifest.counts)}
    tree[_OWN_CHECKSUM] = _checksum_of(tree)
    write_durably(folder / MANIFEST_FILE, (json.dumps(tree, indent=1) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        DataError: the folder or its manifest is missing, damaged, unfinished or of another format version; or the
            folder is that of a run.
    """
    if folder.is_file():
        fix = f"give the folder: {folder.parent}"
        raise DataError("path is a file, not the folder of a dataset", where=str(folder), fix=fix)
    path = folder / MANIFEST_FILE
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _missing(folder) from None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"manifest cannot be read: {error}", where=str(path), fix="prepare the dataset again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT_NAME:
        raise _of_run(folder) or DataError(
            "file is not the manifest of prepared shards", where=str(path), fix="check the path"
        )
    if tree.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"shards have format version {tree.get('format_version')}, but this program reads {FORMAT_VERSION}",
            where=str(path),
            fix="prepare the dataset again, or use the version of the program that wrote it",
        )
    try:
        manifest = manifest_from_tree(tree)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"manifest has a missing or malformed field: {error}"
        raise DataError(what, where=str(path), fix="prepare the dataset again") from None
    missing = [
        f"{shard.name}.{suffix}" for shard in manifest.shards for suffix in SUFFIXES if suffix not in shard.files
    ]
    if missing:
        what = f"manifest lists no {missing[0]}: an older version of this program prepared the dataset"
        raise DataError(what, where=str(path), fix="prepare the dataset again")
    if dataclasses.asdict(manifest.counts) != tree.get("counts"):
        raise DataError("counts in the manifest are not the sums over its shards", where=str(path), fix="prepare again")
    _check_itself(tree, path)
    return manifest


def _checksum_of(tree: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def _check_itself(tree: dict[str, Any], path: Path) -> None:
    content = {name: value for name, value in tree.items() if name != _OWN_CHECKSUM}
    known = {"format", "format_version", "counts", *(entry.name for entry in dataclasses.fields(Manifest))}
    for name in content:
        if name not in known:
            raise DataError(f"manifest has an unknown field {name!r}", where=str(path), fix="prepare the dataset again")
    if tree.get(_OWN_CHECKSUM, _checksum_of(content)) != _checksum_of(content):
        raise DataError(
            "manifest is damaged: it has the wrong checksum", where=str(path), fix="copy or prepare the dataset again"
        )


def _missing(folder: Path) -> DataError:
    if not folder.is_dir():
        return DataError("dataset folder does not exist", where=str(folder), fix="check the path")
    if (folder / WORK_FOLDER).exists():
        fix = "run the same prepare command again; delete the folder if no document became a sample"
        return DataError("the dataset is not completely prepared", where=str(folder), fix=fix)
    return _of_run(folder) or DataError(f"folder has no {MANIFEST_FILE}", where=str(folder), fix=_FIX_FOLDER)


def _of_run(folder: Path) -> DataError | None:
    if not (folder / CONFIG_NAME).is_file():
        return None
    return DataError("folder is a run or a checkpoint, not a dataset", where=str(folder), fix=_FIX_FOLDER)


def _check_numbers(*mappings: dict[str, Any]) -> None:
    for mapping in mappings:
        for name, value in mapping.items():
            if type(value) is not int:
                raise TypeError(f"{name} is {type(value).__name__}, not int")


def manifest_from_tree(tree: dict[str, Any]) -> Manifest:
    """Rebuild a manifest from what `dataclasses.asdict` made of it.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: a field is missing or has the wrong type.
    """
    _check_numbers({"documents": tree["documents"]}, tree["rejects"], tree["notes"])
    return Manifest(
        dataset_name=tree["dataset_name"],
        tokenizer=TokenizerFacts(**tree["tokenizer"]),
        shards=tuple(ShardFacts.from_tree(shard) for shard in tree["shards"]),
        documents=tree["documents"],
        rejects=dict(tree["rejects"]),
        notes=dict(tree["notes"]),
        options=dict(tree["options"]),
        rejects_file=FileFacts(**tree["rejects_file"]) if tree["rejects_file"] else None,
    )
