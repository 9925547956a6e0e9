import sys

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.modules import find_module, module_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package "sorts_of_tea" with two modules and something private."""
    folder = tmp_path / "sorts_of_tea"
    folder.mkdir()
    for name in ("__init__", "oolong", "assam", "_private"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}")
    monkeypatch.syspath_prepend(tmp_path)
    yield "sorts_of_tea"
    for name in [name for name in sys.modules if name.startswith("sorts_of_tea")]:
        del sys.modules[name]


def test_modules_are_listed_by_name_without_importing_them(package):
    assert module_names(package) == ("assam", "oolong")
    assert "sorts_of_tea.assam" not in sys.modules


def test_a_module_is_found_by_its_name(package):
    assert find_module(package, "oolong", "tea").NAME == "oolong"


@pytest.mark.parametrize("name", ["mint", "_private", "assam.x"])
def test_an_unknown_name_lists_what_there_is(package, name):
    with pytest.raises(ConfigError, match=f"unknown tea '{name}'; fix: choose one of assam, oolong"):
        find_module(package, name, "tea")


def test_an_empty_package_says_that_it_has_none(package, tmp_path):
    (tmp_path / "sorts_of_tea" / "herbs").mkdir()
    (tmp_path / "sorts_of_tea" / "herbs" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match=r"unknown tea 'mint' \(tea.yaml:3\); fix: remove it: this version has none"):
        find_module("sorts_of_tea.herbs", "mint", "tea", where="tea.yaml:3")
