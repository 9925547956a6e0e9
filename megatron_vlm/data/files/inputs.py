"""Find the input files of a corpus: files that the user names, and files directly inside the folders he names."""

from collections.abc import Collection, Mapping, Sequence

from megatron_vlm.config import ConfigError
from megatron_vlm.data.files.locations import Location, check_suffixes, list_location
from megatron_vlm.data.files.records import SUFFIXES

TABLE_SUFFIX = ".parquet"
RECORD_SUFFIXES = ".jsonl, .ndjson, .json, each also with .gz or .zip"


def is_table(path: Location) -> bool:
    """Tell whether a file is parquet, by its name."""
    return path.name.lower().endswith(TABLE_SUFFIX)


def find_instruction_files(paths: tuple[Location, ...]) -> tuple[Location, ...]:
    """Return the JSON files among `paths` and directly inside their folders; parquet files of folders without JSON.

    Raises:
        ConfigError: a path does not exist, or there is no such file.
    """
    listed = list_inputs(paths, (*SUFFIXES, TABLE_SUFFIX))
    found: list[Location] = []
    for path in paths:
        check_suffixes(listed[path], (*SUFFIXES, TABLE_SUFFIX))
        records = [file for file in listed[path] if not is_table(file)]
        found += records or listed[path]
    check_each_used(listed, found, f"JSON, JSON-lines or parquet files ({RECORD_SUFFIXES}; .parquet)")
    return tuple(found)


def find_record_files(paths: tuple[Location, ...]) -> tuple[Location, ...]:
    """Return the JSON files among `paths` and directly inside their folders, by name.

    Raises:
        ConfigError: a path does not exist, or there is no such file.
    """
    return find_files(paths, SUFFIXES, f"JSON or JSON-lines files ({RECORD_SUFFIXES})")


def find_files(paths: tuple[Location, ...], suffixes: tuple[str, ...], what: str) -> tuple[Location, ...]:
    """Return the files with one of `suffixes` among `paths` and directly inside their folders, by name.

    Raises:
        ConfigError: a path does not exist, there is no such file, or a named file is of another kind; `what` names the
            kind.
    """
    listed = list_inputs(paths, suffixes)
    files = tuple(file for path in paths for file in listed[path])
    check_suffixes(files, suffixes)
    check_each_used(listed, files, what)
    return files


def list_inputs(paths: Sequence[Location], suffixes: tuple[str, ...]) -> dict[Location, list[Location]]:
    """Return for each path the file itself, or the files with one of `suffixes` directly inside the folder.

    Raises:
        ConfigError: a path does not exist.
    """
    return {path: list_location(path, suffixes) for path in paths}


def check_each_used(listed: Mapping[Location, Sequence[Location]], used: Collection[Location], what: str) -> None:
    """Refuse an input of which nothing would be read, since it would be missing from the result without notice.

    Raises:
        ConfigError: a path has none of the files that are used; `what` names their kind.
    """
    used = set(used)
    for path, files in listed.items():
        if not any(file in used for file in files):
            fix = "check --input" if len(listed) == 1 else "leave it out; prepare each kind of input on its own"
            raise ConfigError(f"input has no {what}", where=str(path), fix=fix)
