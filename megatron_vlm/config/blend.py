"""The datasets of a blend, their proportions, and the steps in which a blend changes during a run.

An entry says from when on it counts. The entries of one time are a step, and take the place of those before:

    blend:
      - {path: coyo, images: 1}
      - {path: mmc4, images: 1}
      - {path: mmc4, images: 1, from_iteration: 5001}
      - {path: flan, images: 1, from_iteration: 5001}
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from megatron_vlm.config.checks import check_path
from megatron_vlm.config.errors import ConfigError

MAX_EPOCHS = 1_000_000
"""Most passes over a dataset, and largest proportion of it in a blend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendEntry:
    """One prepared dataset and how much of it is used; set at most one of weight, epochs and images."""

    path: str
    """Folder written by `prepare`."""
    weight: float | None = None
    """Proportion of the samples in the blend, relative to the other weights."""
    epochs: float | None = None
    """Passes over the dataset; a fraction uses only that much of a shuffled pass."""
    images: float | None = None
    """Proportion of the images in the blend, relative to the other entries (1:1 in the paper)."""
    from_iteration: int | None = None
    """First iteration with this entry, counted from 1 as in the log; None for the start of the run."""
    from_tokens: int | None = None
    """The same by what was trained on: it counts from the first iteration that begins after so many tokens [tokens
    without padding]."""

    def __post_init__(self) -> None:
        check_path("path of a blend entry", self.path)
        given = [name for name in ("weight", "epochs", "images") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"blend entry {self.path} sets {' and '.join(given)}", fix="keep one of them")
        if given and getattr(self, given[0]) <= 0:
            raise ConfigError(f"blend entry {self.path} has {given[0]} <= 0", fix="give a positive number")
        if given and getattr(self, given[0]) > MAX_EPOCHS:
            raise ConfigError(
                f"blend entry {self.path} has {given[0]} above {MAX_EPOCHS:,}", fix="give a smaller number"
            )
        if self.from_iteration is not None and self.from_tokens is not None:
            raise ConfigError(f"blend entry {self.path} sets from_iteration and from_tokens", fix="keep one of them")
        for name, least in (("from_iteration", 2), ("from_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"blend entry {self.path} has {name} below {least}", fix="remove it")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendStep:
    """The entries that count from one time on, until the next step begins."""

    entries: tuple[BlendEntry, ...]
    datasets: tuple[int, ...]
    """Position of each entry in `datasets_of`."""

    @property
    def from_iteration(self) -> int | None:
        """As in the entries."""
        return self.entries[0].from_iteration

    @property
    def from_tokens(self) -> int | None:
        """As in the entries."""
        return self.entries[0].from_tokens


def steps_of(blend: tuple[BlendEntry, ...]) -> tuple[BlendStep, ...]:
    """Return the steps of a blend in order; one if it does not change."""
    places = {key: place for place, key in enumerate(_datasets(blend))}
    return tuple(
        BlendStep(entries=entries, datasets=tuple(places[key] for key in _keys(entries)))
        for entries in _entries_by_time(blend)
    )


def datasets_of(blend: tuple[BlendEntry, ...]) -> tuple[BlendEntry, ...]:
    """Return the first entry of each dataset, in the order of their appearance.

    Entries of different steps with the same path are one dataset, which is read on; those of one step are several.
    """
    return tuple(_datasets(blend).values())


def check_blend(section: str, blend: tuple[BlendEntry, ...]) -> None:
    """Check that the entries of each step have one kind of proportion, and that steps follow each other.

    Raises:
        ConfigError: they do not.
    """
    for step in steps_of(blend):
        kinds = {
            "epochs" if entry.weight is None and entry.images is None else "weight" if entry.weight else "images"
            for entry in step.entries
        }
        if len(kinds) > 1:
            raise ConfigError(
                f"{section} mixes {', '.join(sorted(kinds))}", fix="use one kind of proportion for all entries"
            )
    times = [_time(entry) for entry in blend]
    if times and times[0] != (None, None):
        raise ConfigError(
            f"no entry of {section} counts from the start of the run", fix="remove from_iteration or from_tokens of one"
        )
    later = times[times.count((None, None)) :]
    if (None, None) in later or len({by_iteration is None for by_iteration, _ in later}) > 1:
        raise ConfigError(
            f"the entries of {section} are not in the order of their steps, or mix from_iteration and from_tokens",
            fix="list those of the start first, and give all others one of the two",
        )
    amounts = [iteration or tokens or 0 for iteration, tokens in later]
    for before, after in pairwise(amounts):
        if after < before:
            raise ConfigError(f"{section} has a step from {after} behind one from {before}", fix="list them in order")


def _time(entry: BlendEntry) -> tuple[int | None, int | None]:
    return entry.from_iteration, entry.from_tokens


def _entries_by_time(blend: tuple[BlendEntry, ...]) -> list[tuple[BlendEntry, ...]]:
    """Return the entries of each step, the steps in the order of their first entries."""
    groups: dict[tuple[int | None, int | None], list[BlendEntry]] = {}
    for entry in blend:
        groups.setdefault(_time(entry), []).append(entry)
    return [tuple(entries) for entries in groups.values()]


def _keys(entries: tuple[BlendEntry, ...]) -> list[tuple[str, int]]:
    """Return path and occurrence of each entry of a step."""
    seen: Counter[str] = Counter()
    keys = []
    for entry in entries:
        keys.append((entry.path, seen[entry.path]))
        seen[entry.path] += 1
    return keys


def _datasets(blend: tuple[BlendEntry, ...]) -> dict[tuple[str, int], BlendEntry]:
    found: dict[tuple[str, int], BlendEntry] = {}
    for entries in _entries_by_time(blend):
        for key, entry in zip(_keys(entries), entries, strict=True):
            found.setdefault(key, entry)
    return found
