"""Every file of config/sources describes a kind of corpus, and data/sources reads it; a new kind is two new files."""

import importlib
import inspect
import sys

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import ConfigError
from megatron_vlm.config import sources as kinds
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.prepare import ImageOptions, Recipe
from megatron_vlm.data import sources as readers
from megatron_vlm.data.shards.manifest import load_manifest
from megatron_vlm.data.sources.source import SourceModule
from tests.support.sentence_piece import train_sentence_piece

KINDS, READERS = "megatron_vlm.config.sources", "megatron_vlm.data.sources"
TOY_OPTIONS = """
from dataclasses import dataclass
from typing import Annotated

from megatron_vlm.config.options import Option
from megatron_vlm.config.prepare import Recipe

HELP, EXAMPLE, NOTES = "words of a file", "--input words.txt --output shards/words --tokenizer T", ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    longest: Annotated[int, Option("longest word [characters]", least=1)] = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    rules: Rules = Rules()
    images = None
    dataset_name = "words"
    recipe = Recipe()
"""
TOY_READER = """
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.documents import Document, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.source import Found


@dataclass(frozen=True)
class WordSource:
    inputs: tuple
    rules: Any

    def read(self, path, context):
        for line, word in enumerate(path.read_text().split()):
            if len(word) > self.rules.longest:
                yield Found(line, word, RejectError("word_too_long", word))
            else:
                yield Found(line, word, Document((Text(word),), key=word))


def find_source(paths, options, tokenizer):
    return WordSource(tuple(paths), options.rules)
"""


@pytest.mark.parametrize("name", module_names(KINDS))
def test_every_kind_has_its_texts_and_options(name):
    kind = find_module(KINDS, name, "kind")
    options = kind.Options()
    assert kind.HELP.strip()
    assert "\n" not in kind.HELP + kind.EXAMPLE
    assert all(flag in kind.EXAMPLE for flag in ("--input", "--output", "--tokenizer"))
    assert isinstance(kind.NOTES, str)
    assert options.dataset_name
    assert isinstance(options.recipe, Recipe)
    assert isinstance(options.images, ImageOptions | None)
    assert options.rules is not None


@pytest.mark.parametrize("name", module_names(KINDS))
def test_every_kind_has_its_reader(name):
    find_source = importlib.import_module(f"{READERS}.{name}").find_source
    wanted = inspect.signature(SourceModule.find_source)
    assert list(inspect.signature(find_source).parameters) == list(wanted.parameters)[1:]


def test_unknown_kind_lists_what_there_is():
    with pytest.raises(ConfigError, match="unknown kind 'web'; fix: choose one of conversations, interleaved, pairs"):
        find_module(KINDS, "web", "kind")


def test_a_kind_is_added_without_editing_a_file(tmp_path, monkeypatch):
    for package, code in ((kinds, TOY_OPTIONS), (readers, TOY_READER)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "toy.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.toy", raising=False)
    (tmp_path / "words.txt").write_text("tea coffee milk")
    command = ["prepare", "toy", "--input", str(tmp_path / "words.txt"), "--output", str(tmp_path / "d")]
    command += ["--tokenizer", str(train_sentence_piece(tmp_path)), "--workers", "1"]
    assert main([*command, "--longest", "5"]) == 0
    manifest = load_manifest(tmp_path / "d")
    assert (manifest.dataset_name, manifest.documents, manifest.rejects) == ("words", 3, {"word_too_long": 1})
    assert manifest.options["rules"] == {"longest": 5}
