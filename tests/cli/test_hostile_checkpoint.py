"""No command that reads a checkpoint runs code from it; each ends with one line and 65."""

import shutil

import pytest

from megatron_vlm.cli.main import main
from tests.support.hostile import write_hostile_index

COMMANDS = {
    "verify": ["checkpoint", "verify", "{run}"],
    "hash": ["checkpoint", "hash", "{run}"],
    "to_hf": ["convert", "to-hf", "{run}", "--output", "{run}/out"],
    "generate": ["generate", "{run}", "--prompt", "what?", "--max-new-tokens", "2"],
    "evaluate": ["evaluate", "{run}", "--task", "vqa", "--questions", "{place}/questions.json", "--output", "{run}/a"],
}


@pytest.fixture
def hostile(place, tmp_path):
    """A run whose only checkpoint names a function of torch that unpickles another file; and what it would create."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    write_hostile_index(run / "checkpoints" / "iter_0000000", tmp_path / "canary")
    return run, tmp_path / "canary"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hostile_index_runs_no_code(name, hostile, place, capsys):
    run, canary = hostile
    assert main([part.format(run=run, place=place) for part in COMMANDS[name]]) == 65
    shown = capsys.readouterr()
    assert not canary.exists()
    lines = [line for line in (shown.out + shown.err).splitlines() if "damaged or hostile" in line]
    assert len(lines) == 1
    assert "it names torch.distributed.checkpoint.format_utils.torch_" in lines[0]  # a long line is cut there
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("verb", ["resume", "load_weights"])
def test_training_starts_from_no_hostile_index(verb, hostile, project):
    run, canary = hostile
    setting = f"run_dir={run}" if verb == "resume" else f"checkpoint.load_weights={run}"
    done = project.run("train", "train.yaml", f"run_dir={run.parent}/new", setting)
    assert (done.returncode, canary.exists()) == (65, False), done.stderr
    assert sum("megatron-vlm: error:" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
