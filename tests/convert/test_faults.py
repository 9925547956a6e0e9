"""Conversions that fail or are killed: one line, the right exit code, no half folder, and nothing lost."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.folder import LATEST_NAME, find_checkpoint, list_iterations
from megatron_vlm.checkpoint.manifest import checksum_file, read_manifest, write_manifest
from megatron_vlm.cli.main import main
from megatron_vlm.config.adapters.lora import Config
from megatron_vlm.platform.files import durable
from megatron_vlm.platform.files.locks import locked
from megatron_vlm.platform.files.run_folder import LOCK_NAME
from tests.support.random_run import write_random_adapter

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PARTS = {"language": ("language_model.", "text_config"), "vision": ("vision_tower.", "vision_config")}
COMMANDS = {
    "parts": "from-hf --language {language} --vision {vision} --output {out}",
    "model": "from-hf --model {model} --output {out}",
    "adapter": "from-hf --peft {peft} --base {run} --output {out}",
    "llava": "to-hf {run} --output {out}",
    "peft": "to-hf {adapted} --format peft --output {out}",
    "verify": "verify {run} {model} --no-logits",
}


@pytest.fixture(scope="module")
def sources(make_run, model_config, exported, tokenizer_path, tmp_path_factory) -> Path:
    """A folder with a run, one with an adapter, and Hugging Face folders of a whole model, its parts and LoRA."""
    place = tmp_path_factory.mktemp("sources")
    shutil.copytree(make_run(model_config), place / "run")
    shutil.copytree(exported, place / "model")
    tensors, config = load_file(exported / WEIGHTS), json.loads((exported / CONFIG).read_text())
    for part, (prefix, section) in PARTS.items():
        (place / part).mkdir()
        (place / part / CONFIG).write_text(json.dumps(config[section]))
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        save_file(own, place / part / WEIGHTS)
    shutil.copyfile(tokenizer_path, place / "language" / "tokenizer.model")
    model = replace(model_config, adapter=Config(rank=2))
    write_random_adapter(place / "adapted", place / "run", model, tokenizer_path)
    assert main(["convert", "to-hf", str(place / "adapted"), "--format", "peft", "--output", str(place / "peft")]) == 0
    return place


@dataclass(frozen=True)
class Door:
    """A conversion, and the place that it writes."""

    place: Path
    name: str

    @property
    def out(self) -> Path:
        return self.place / "made" / "out"

    def command(self, *options: str) -> list[str]:
        places = {path.name: path for path in self.place.iterdir()}
        return ["convert", *COMMANDS[self.name].format(out=self.out, **places).split(), *options]

    def made(self) -> dict[str, bytes]:
        """Return the content of the folder, without the name of the process, and what people alone read."""
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file() and path.name not in (LOCK_NAME, LATEST_NAME, LATEST_NAME + durable.UNFINISHED)
        }

    def assert_nothing_is_made(self) -> None:
        """There is no export and no checkpoint, finished or not."""
        assert [path.name for path in self.out.parent.iterdir()] in ([], ["out"])
        assert not list_iterations(self.out)
        assert not list(self.out.glob("checkpoints/*"))
        if self.name in ("llava", "peft"):
            assert not self.out.exists()


@pytest.fixture
def door(sources, tmp_path) -> Callable[[str], Door]:
    """Return a conversion of copies: door(name)."""

    def make(name: str) -> Door:
        shutil.copytree(sources, tmp_path / "place")
        (tmp_path / "place" / "made").mkdir()
        return Door(tmp_path / "place", name)

    return make


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def a_matrix(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if tensors[name].dim() == 2 and tensors[name].size(1) > 1)


def other_shape(tensors):
    tensors[a_matrix(tensors)] = torch.zeros(7, 5)


def other_type(tensors):
    tensors[a_matrix(tensors)] = tensors[a_matrix(tensors)].int()


def missing_tensor(tensors):
    del tensors[a_matrix(tensors)]


def extra_tensor(tensors):
    tensors["surprise.weight"] = torch.zeros(3)


def cut_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)


def missing_file(folder: Path) -> None:
    """An index names two files, one of which is missing with half of the tensors."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    if file.name == WEIGHTS:
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: files[number % 2] for number, name in enumerate(tensors)}
        save_file({name: tensors[name] for name in tensors if weight_map[name] == files[0]}, folder / files[0])
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()


def other_config(folder: Path) -> None:
    (file,) = folder.glob("*config.json") if (folder / CONFIG).exists() is False else [folder / CONFIG]
    config = json.loads(file.read_text())
    for section in (config, *(config[name] for _, name in PARTS.values() if name in config)):
        for name, value in {"hidden_size": 64, "num_hidden_layers": 9, "peft_type": "IA3"}.items():
            if name in section:
                section[name] = value
    file.write_text(json.dumps(config))


def no_config(folder: Path) -> None:
    for name in (CONFIG, "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)


FOLDER_FAULTS = {
    "shape": change_weights(other_shape),
    "type": change_weights(other_type),
    "missing": change_weights(missing_tensor),
    "extra": change_weights(extra_tensor),
    "cut": cut_weights,
    "file": missing_file,
    "config": other_config,
    "no_config": no_config,
}


def values_of(run: Path) -> Path:
    return max(find_checkpoint(run).glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip_bit(run: Path) -> None:
    content = bytearray(values_of(run).read_bytes())
    content[len(content) // 2] ^= 1
    values_of(run).write_bytes(content)


def cut_values(run: Path) -> None:
    os.truncate(values_of(run), values_of(run).stat().st_size // 2)


def other_settings(run: Path) -> None:
    """The settings are those of another model, and the manifest vouches for them."""
    checkpoint = find_checkpoint(run)
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("  ffn_hidden_size: ", "  ffn_hidden_size: 1"))
    manifest = read_manifest(checkpoint)
    manifest.files["config.yaml"] = checksum_file(config)
    write_manifest(checkpoint, manifest)


CHECKPOINT_FAULTS = {
    "bit": flip_bit,
    "cut": cut_values,
    "missing": lambda run: values_of(run).unlink(),
    "extra": lambda run: (find_checkpoint(run) / "stranger").write_text("x"),
    "config": other_settings,
    "no_manifest": lambda run: (find_checkpoint(run) / "manifest.json").unlink(),
}
CASES = [
    *((name, source, fault) for name, source in (("parts", "language"), ("model", "model")) for fault in FOLDER_FAULTS),
    *(("adapter", "peft", fault) for fault in FOLDER_FAULTS),
    *((name, source, fault) for name, source in (("llava", "run"), ("peft", "adapted")) for fault in CHECKPOINT_FAULTS),
    *(pytest.param("parts", "vision", fault, marks=pytest.mark.slow) for fault in FOLDER_FAULTS),
    *(pytest.param("verify", "model", fault, marks=pytest.mark.slow) for fault in FOLDER_FAULTS),
    *(pytest.param("verify", "run", fault, marks=pytest.mark.slow) for fault in CHECKPOINT_FAULTS),
    *(pytest.param("adapter", "run", fault, marks=pytest.mark.slow) for fault in CHECKPOINT_FAULTS),
]


def assert_one_line(errors: str) -> None:
    assert sum("megatron-vlm: error:" in line for line in errors.splitlines()) == 1, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("name", "source", "fault"), CASES)
def test_a_damaged_source_is_one_line_and_leaves_nothing(name, source, fault, door, capsys):
    found = door(name)
    faults = CHECKPOINT_FAULTS if source in ("run", "adapted") else FOLDER_FAULTS
    faults[fault](found.place / source)
    assert main(found.command()) == 65
    assert_one_line(capsys.readouterr().err)
    found.assert_nothing_is_made()


@dataclass(frozen=True)
class Forked:
    """A command in a copy of this process, which has imported everything."""

    process: int
    errors: int
    """The end of a pipe that reads what it prints; a file would count as one that it writes."""

    @classmethod
    def start(cls, command: list[str], prepare: Callable[[], object] = lambda: None) -> "Forked":
        reading, writing = os.pipe()
        process = os.fork()
        if process:
            os.close(writing)
            return cls(process, reading)
        code = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            prepare()
            code = main(command)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Return the exit code and what it printed."""
        with open(self.errors) as stream:
            text = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), text


def limit_files(size: int) -> None:
    """Let no file grow beyond a size [bytes], as on a disk that is full then."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [300, 60_000])
@pytest.mark.parametrize("name", ["parts", "adapter", "llava", "peft"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(name, size, door):
    found = door(name)
    options = []
    if name in ("llava", "peft"):
        found.out.mkdir()
        (found.out / CONFIG).write_text("kept")
        options = ["--overwrite"]
    code, errors = Forked.start(found.command(*options), lambda: limit_files(size)).wait()
    assert code == 74, errors
    assert_one_line(errors)
    if options:
        assert found.made() == {CONFIG: b"kept"}
        shutil.rmtree(found.out)
    found.assert_nothing_is_made()
    assert main(found.command()) == 0


def test_a_second_conversion_to_the_same_place_is_refused_in_one_line(door, capsys):
    for name, what in (("llava", "another process writes this folder"), ("parts", "another job uses this run folder")):
        found = door(name)
        found.out.parent.joinpath("out" if name == "parts" else "").mkdir(exist_ok=True)
        lock = found.out / LOCK_NAME if name == "parts" else found.out.with_name("out" + durable.LOCK)
        with locked(lock):
            assert main(found.command()) == 78
        errors = capsys.readouterr().err
        assert_one_line(errors)
        assert what in errors
        shutil.rmtree(found.place)


class Killer:
    """Ends this process with SIGKILL at the n-th time that something reaches the disk."""

    def __init__(self, number: int) -> None:
        self._left = number

    def prepare(self) -> None:
        for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted


def assert_harmless(found: Door, before: dict[str, bytes], whole: dict[str, bytes], options: list[str]) -> None:
    """After a kill, the place holds the old or the new content; the next conversion makes the rest and cleans up."""
    kept = found.made() if found.out.exists() else {}
    is_run = "from-hf" in found.command()
    if is_run:
        assert not list_iterations(found.out) or kept.items() >= whole.items()
    elif not found.out.with_name("out" + durable.SET_ASIDE).exists():
        assert kept in (before, whole)
    if not list_iterations(found.out):
        assert main(found.command(*options)) == 0
    assert {name: content for name, content in found.made().items() if name in whole} == whole
    assert set(found.made()) == set(whole)
    assert [path.name for path in found.out.parent.iterdir()] == ["out"]
    if is_run:
        # A kill after the checkpoint may leave that of the hint to the newest, which the next save replaces.
        assert not list(found.out.glob(f"checkpoints/iter_*{durable.UNFINISHED}"))


def prepare_kill(found: Door) -> tuple[dict[str, bytes], dict[str, bytes], list[str]]:
    """Return what the place holds before, what it holds after an undisturbed conversion, and options to replace it."""
    assert main(found.command()) == 0
    whole = found.made()
    shutil.rmtree(found.out)
    if "from-hf" in found.command():
        return {}, whole, []
    found.out.mkdir()
    (found.out / CONFIG).write_text("kept")
    return found.made(), whole, ["--overwrite"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["parts", "llava"])
def test_a_kill_where_something_reaches_the_disk_loses_nothing(name, number, door):
    found = door(name)
    before, whole, options = prepare_kill(found)
    code, errors = Forked.start(found.command(*options), Killer(number).prepare).wait()
    assert code == -signal.SIGKILL, errors
    assert_harmless(found, before, whole, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts", "model", "adapter", "llava", "peft"])
def test_kills_at_random_moments_lose_nothing(name, door):
    found = door(name)
    before, whole, options = prepare_kill(found)
    started = time.perf_counter()
    assert Forked.start(found.command(*options)).wait()[0] == 0
    seconds, moments, kills = time.perf_counter() - started, random.Random(name), 0
    while kills < 10:
        shutil.rmtree(found.out)
        if options:
            found.out.mkdir()
            (found.out / CONFIG).write_text("kept")
        conversion = Forked.start(found.command(*options))
        time.sleep(seconds * moments.random())
        os.kill(conversion.process, signal.SIGKILL)
        if conversion.wait()[0] == -signal.SIGKILL:
            kills += 1
        else:  # it ended before: the machine is less busy than it was
            seconds *= 0.8
        assert_harmless(found, before, whole, options)
