"""What the pages for readers name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
# `tests/...`, `docs/...`, `examples/...`, `tools/...`, `megatron_vlm/...` and, in a table of files, paths inside the
# package.
PATHS = re.compile(
    r"(?<![\w/<])((?:tests|docs|examples|tools|megatron_vlm|cli|config|convert|costs|data|evaluation|models|parallel"
    r"|platform|training|checkpoint)/[\w/.]*\w\.(?:py|md|sh|sbatch|yaml|txt))\b"
)
LINKS = re.compile(r"\]\((?!https?://)([^)#]+)\)")


def missing(page: Path, text: str) -> list[str]:
    """Return what a page names that is neither in the repository nor in the package."""
    paths = [
        name
        for name in PATHS.findall(text)
        if not any((base / name).exists() for base in (ROOT, ROOT / "megatron_vlm"))
    ]
    links = [name for name in LINKS.findall(text) if not (page.parent / name).exists()]
    return sorted({*paths, *links})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_by_a_page_exist(page):
    assert not missing(page, page.read_text())


def test_missing_files_are_found():
    assert missing(ROOT / "README.md", "`tests/no_such.py`, `data/none.py`, [a](docs/none.md), `config/<type>.py`") == [
        "data/none.py",
        "docs/none.md",
        "tests/no_such.py",
    ]
