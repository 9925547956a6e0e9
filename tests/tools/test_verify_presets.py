"""docs/verified.md is what tools/verify_presets.py writes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verified.md").read_text()


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import verify_presets
    finally:
        sys.path.pop(0)
    return verify_presets


def read_columns(page):
    """Return the facts of each version that the tables of the page have."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    versions = next(row[2:] for row in rows if row[0] == "preset")
    columns = [{"version": version.removeprefix("transformers "), "presets": {}} for version in versions]
    for name, _, *cells in (row for row in rows if len(row) == 2 + len(versions)):
        for column, cell in zip(columns, cells, strict=True):
            column["presets"][name] = cell
    return columns


def test_the_page_has_every_preset_at_its_size_and_is_written_by_the_tool(tool):
    assert tool.render(read_columns(PAGE), torch_version=tool.torch_version(PAGE)) == PAGE


def test_nothing_on_the_page_differs():
    found = read_columns(PAGE)
    assert len(found) == 2
    assert not [cell for column in found for cell in column["presets"].values() if "differ" in cell]


def test_the_figures_of_small_presets_are_found_again(tool):
    transformers = pytest.importorskip("transformers")
    column = next(one for one in read_columns(PAGE) if one["version"] == transformers.__version__)
    names = ["smollm2-135m", "dinov2-s", "clip-l14-336", "vila1.5-40b"]
    assert tool.facts(names)["presets"] == {name: column["presets"][name] for name in names}


@pytest.mark.slow
def test_so_are_those_of_all_presets(tool):
    transformers = pytest.importorskip("transformers")
    column = next(one for one in read_columns(PAGE) if one["version"] == transformers.__version__)
    assert tool.facts()["presets"] == column["presets"]
