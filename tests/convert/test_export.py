"""Every export format is found by its name."""

import inspect

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from megatron_vlm.config import UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert import formats
from megatron_vlm.convert.export import FORMATS, Format, export, is_whole_model
from megatron_vlm.convert.to_hf import ExportOptions

TOY = """
def export(settings, output, options):
    output.mkdir()
    return "toys"
"""


@pytest.mark.parametrize("name", module_names(FORMATS))
def test_a_format_has_the_function_that_is_called(name):
    offered, wanted = (
        list(inspect.signature(owner.export).parameters) for owner in (find_module(FORMATS, name, "format"), Format)
    )
    assert offered == wanted[1:]
    assert not is_whole_model(name)


def test_an_unknown_format_lists_those_of_both_kinds(make_run, model_config, tmp_path):
    settings = read_run_settings(make_run(model_config))
    with pytest.raises(UsageError, match=r"unknown export format 'llama'; fix: choose one of .*llava, .*peft"):
        export(settings, tmp_path / "x", ExportOptions(format="llama"))


def test_a_new_file_is_a_new_format(make_run, model_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    command = ["convert", "to-hf", str(make_run(model_config)), "--format", "toy", "--output", str(tmp_path / "x")]
    assert main([*command, "--verify"]) == 64
    assert "--verify does not read the format toy; fix: leave it out" in capsys.readouterr().err
    assert main(command) == 0
    assert "for toys" in capsys.readouterr().out
