"""How a field of a settings dataclass describes itself as a command-line option.

The default stands in the dataclass only, and so does the text for the user:

    max_images: Annotated[int, Option("maximum number of images per document", least=1)] = 6

`cli/options.py` makes the flag --max-images of it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Option:
    """What the type and the default of a field do not say."""

    help: str
    """Text for the user, with the unit; the default is added to it."""
    least: float | None = None
    most: float | None = None
    flag: str | None = None
    """The flag, where it is not the name of the field."""
    metavar: str | None = None
    default: str | None = None
    """How the help shows the default, where the value itself does not explain it."""
    needs: str | None = None
    """An option without which this one has no effect: "--prompts", or with its value "--distributor ray"."""
    path: Literal["location", "local", "new_folder"] | None = None
    """A path or a URL; an existing local path; a folder to write."""


@dataclass(frozen=True, slots=True)
class Group:
    """Marks a field that is itself a dataclass: its options have a heading of their own in the help."""

    title: str
    without: tuple[str, ...] = ()
    """Fields that are not options here."""
