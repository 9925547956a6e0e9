"""Print pip constraints that keep every package of a container image and add ours for the rest.

The Dockerfile runs it on NVIDIA's image:  python tools/image_constraints.py constraints.txt > merged.txt
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path


def canonical_name(name: str) -> str:
    """Return the canonical spelling of a package name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def merge_constraints(ours: Iterable[str], installed: Mapping[str, str]) -> Iterator[str]:
    """Yield one constraint per package.

    Args:
        ours: lines of a constraints file, `name==version` with an optional marker.
        installed: versions of the packages in the image, by name.
    """
    kept = {canonical_name(name): version for name, version in installed.items()}
    yield from (f"{name}=={version}" for name, version in sorted(kept.items()))
    for line in ours:
        line = line.split("#")[0].strip()
        if line and canonical_name(line.split("==")[0]) not in kept:
            yield line


def main() -> None:
    """Print the constraints of this environment merged with the file named by the first argument."""
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    lines = Path(sys.argv[1]).read_text().splitlines()
    sys.stdout.write("\n".join(merge_constraints(lines, installed)) + "\n")


if __name__ == "__main__":
    main()
