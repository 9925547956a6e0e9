"""The rules of the house that a parser can check; CONTRIBUTING.md says why they are as they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_vlm"
# Code imports from lower ranks only; equal ranks are siblings that do not know each other.
RANKS = {
    "config": 0,
    "platform": 1,
    "parallel": 2,
    "data": 3,
    "models": 3,
    "costs": 4,
    "checkpoint": 4,
    "convert": 5,
    "training": 5,
    "evaluation": 5,
    "cli": 6,
}
DATA_GROUND = {"documents", "samples", "rejects"}
# What each room of data may import besides itself; an arrow that is not here goes upwards.
DATA_ROOMS = {
    "text": DATA_GROUND,
    "images": DATA_GROUND,
    "files": DATA_GROUND,
    "tasks": set(),
    "plan": {"samples"},
    "select": DATA_GROUND | {"files", "tasks"},
    "shards": DATA_GROUND | {"text", "images", "tasks"},
    "sources": DATA_GROUND | {"files", "text", "images"},
    "prepare": DATA_GROUND | {"sources", "shards", "files", "text", "images", "tasks"},
    "loading": DATA_GROUND | {"plan", "shards", "images", "text"},
}
# Files that have no test at the mirrored path, and where they are tested instead, by reason.
TESTED_ELSEWHERE = {
    "convert/quantize/layouts/compressed_tensors.py": "convert/quantize/test_layout.py",
    "convert/quantize/layouts/gemm.py": "convert/quantize/test_layout.py",
    "convert/quantize/layouts/tinychat.py": "convert/quantize/test_layout.py",
    # Facts and protocols: every test that uses them holds them.
    "__main__.py": "cli/test_main.py",
    "checkpoint/differences.py": "cli/test_checkpoint.py",
    "config/activations.py": "costs/test_activations.py",
    "config/checks.py": "config/test_train.py",
    "config/options.py": "cli/test_options.py",
    "convert/adapter.py": "convert/adapters/test_lora.py",
    "convert/family.py": "convert/families/test_protocol.py",
    "convert/projector.py": "convert/projectors/test_protocol.py",
    "data/plan/rows.py": "data/plan/test_compute.py",
    "data/plan/settings.py": "data/plan/test_compute.py",
    "data/samples.py": "data/shards/test_writer.py",
    "data/shards/manifest.py": "data/shards/test_verify.py",
    "data/sources/source.py": "data/sources/test_sources.py",
    "evaluation/task.py": "evaluation/tasks/test_protocol.py",
    "training/state.py": "training/test_step.py",
    # Modules found by name: one test for the whole folder, or the test of their counterpart.
    "config/hooks/profiler.py": "training/hooks/test_profiler.py",
    "config/hooks/wandb.py": "training/hooks/test_wandb.py",
    "config/objectives/language_modelling.py": "training/objectives/test_protocol.py",
    "config/sources/pairs.py": "data/sources/test_sources.py",
    "config/sources/text.py": "data/sources/test_sources.py",
    "convert/families/clip.py": "convert/test_from_hf.py",
    "convert/families/dinov2.py": "convert/families/test_towers.py",
    "convert/families/intern_vit_6b.py": "convert/families/test_towers.py",
    "convert/families/internvit.py": "convert/families/test_towers.py",
    "convert/families/siglip.py": "convert/families/test_towers.py",
    "convert/vision_transformer.py": "convert/families/test_towers.py",
    "convert/vila_settings.py": "convert/families/test_vila.py",
    "convert/whole_model.py": "convert/families/test_vila.py",
    "convert/files/language.py": "convert/test_to_hf.py",
    "convert/families/llava.py": "convert/test_to_hf.py",
    "convert/projectors/downsample.py": "convert/projectors/test_protocol.py",
    "convert/projectors/linear.py": "convert/test_to_hf.py",
    "convert/projectors/mlp2x_gelu.py": "convert/test_to_hf.py",
    "convert/projectors/mlp_downsample.py": "convert/projectors/test_protocol.py",
    "convert/projectors/transformer_block.py": "convert/projectors/test_protocol.py",
    "data/sources/conversations.py": "data/sources/test_sources.py",
    "data/sources/text.py": "data/sources/test_sources.py",
    # Steps of one path: what they do together is the claim.
    "checkpoint/open_model.py": "evaluation/test_answer.py",
    "checkpoint/tensors.py": "convert/test_from_hf.py",
    "checkpoint/verify.py": "cli/test_checkpoint.py",
    "convert/differences.py": "convert/test_from_hf.py",
    "convert/from_peft.py": "convert/test_peft.py",
    "convert/peft_names.py": "convert/test_peft.py",
    "convert/formats/peft.py": "convert/test_peft.py",
    "convert/gguf_file.py": "convert/formats/test_gguf.py",
    "convert/files/processor.py": "convert/test_to_hf.py",
    "convert/files/tokenizers/byte_pair.py": "convert/files/test_prompt_rules.py",
    "convert/files/tokenizers/sentence_piece.py": "convert/files/test_prompt_rules.py",
    "data/prepare/output.py": "data/prepare/test_merge.py",
    "data/sources/instructions/conversations.py": "data/sources/test_sources.py",
    "data/sources/interleaved/documents.py": "data/sources/test_sources.py",
    "data/sources/interleaved/source.py": "data/sources/test_sources.py",
    "data/sources/pairs/source.py": "data/sources/test_sources.py",
    "data/sources/tar_samples.py": "data/sources/interleaved/test_tars.py",
    "evaluation/opened_model.py": "evaluation/test_run.py",
    "models/layers/projection.py": "models/projectors/test_linear.py",
    "cli/rehearsal_text.py": "cli/test_rehearse.py",
    "data/loading/inspection.py": "training/test_batch_listing.py",
    "data/loading/reader.py": "data/loading/test_loader.py",
    "platform/fake_device/events.py": "platform/fake_device/test_collectives.py",
    "platform/gpus.py": "costs/test_cluster.py",
    "platform/host.py": "platform/test_host_guard.py",
    "training/blend.py": "training/test_validation.py",
    "training/gradients.py": "training/test_step.py",
    "training/hooks/validation.py": "training/test_validation.py",
    "training/rehearsal/facts.py": "training/rehearsal/test_comparison.py",
    "training/setup.py": "checkpoint/test_resume.py",
}
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
HOST, FAKE_DEVICE = f"{PACKAGE}/platform/host.py", f"{PACKAGE}/platform/fake_device"
MAX_LINES = 500


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT / PACKAGE)}:{node.lineno}"


def layer_of(path: Path) -> str | None:
    """Return the layer of a file; None for the two files that stand above all of them."""
    parts = path.relative_to(ROOT / PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imports_of(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every import, those inside functions too, with the full name of what it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def upward_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    layer = layer_of(path)
    if layer is None:
        return
    for node, name in imports_of(tree):
        if name.startswith("."):
            yield f"{place(path, node)}: imports are absolute, not {name}"
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) < 2 or parts[1] not in RANKS:
            continue
        if parts[1] != layer and RANKS[parts[1]] >= RANKS[layer]:
            yield f"{place(path, node)}: {layer} must not import {parts[1]}"


def imports_between_rooms(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield imports of one room of data from another that `DATA_ROOMS` does not have; ground files know each other."""
    parts = path.relative_to(ROOT / PACKAGE).parts
    if layer_of(path) != "data" or parts[1] == "__init__.py":
        return
    room = parts[1].removesuffix(".py")
    allowed = DATA_GROUND if room in DATA_GROUND else DATA_ROOMS.get(room, set())
    for node, name in imports_of(tree):
        target = name.split(".")
        if target[:2] == [PACKAGE, "data"] and len(target) > 2 and target[2] != room and target[2] not in allowed:
            yield f"{place(path, node)}: data/{room} must not import data/{target[2]}"


def files_outside_of_rooms(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield files of data that stand in none of its rooms, and rooms without a line in `DATA_ROOMS`."""
    if layer_of(path) != "data":
        return
    parts = path.relative_to(ROOT / PACKAGE).parts
    known = DATA_ROOMS.keys() if len(parts) > 2 else DATA_GROUND | {"__init__"}
    if parts[1].removesuffix(".py") not in known:
        yield f"{'/'.join(parts)}:1: data has the rooms {', '.join(DATA_ROOMS)} and the files {', '.join(DATA_GROUND)}"


def torch_where_it_is_not_needed(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield imports of torch in settings, costs and data; of data only the loader makes tensors."""
    layer = layer_of(path)
    if layer not in ("config", "costs", "data") or path.is_relative_to(ROOT / PACKAGE / "data" / "loading"):
        return
    for node, name in imports_of(tree):
        if name.split(".")[0] == "torch":
            yield f"{place(path, node)}: {layer} must not import torch, except data/loading"


def framework_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Data is prepared, planned and loaded without a GPU or megatron-core."""
    if layer_of(path) not in ("config", "data"):
        return
    for node, name in imports_of(tree):
        if name.startswith(("torch.cuda", "megatron.core")):
            yield f"{place(path, node)}: {layer_of(path)} must not import {name}"


def prints(path: Path, tree: ast.Module) -> Iterator[str]:
    if layer_of(path) == "cli":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{place(path, node)}: the library logs, it does not print"


def torch_patches(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield assignments to attributes of torch: only what stands in for CUDA changes it."""
    if path == ROOT / HOST or path.is_relative_to(ROOT / FAKE_DEVICE):
        return
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            names.append(f"{ast.unparse(node.args[0])}.")
        for name in names:
            if name.startswith("torch.") and not name.startswith("torch.backends."):
                yield f"{place(path, node)}: only {HOST} and {FAKE_DEVICE} change torch"


def environment_reads(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield uses of the environment outside cli and platform: settings come from the configuration."""
    if layer_of(path) in ("cli", "platform"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield f"{place(path, node)}: only cli and platform read the environment"


RULES = (
    upward_imports,
    imports_between_rooms,
    files_outside_of_rooms,
    torch_where_it_is_not_needed,
    framework_imports,
    prints,
    torch_patches,
    environment_reads,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    found = [violation for path in SOURCES for violation in rule(path, parse(path))]
    assert not found, "\n".join(found)


def test_no_file_is_too_long_to_read():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    long = [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES]
    assert not long, f"split by subject (at most {MAX_LINES} lines): " + ", ".join(long)


def test_every_file_has_its_test_at_the_mirrored_path():
    tests, files = ROOT / "tests", [path.relative_to(ROOT / PACKAGE) for path in SOURCES if path.name != "__init__.py"]
    mirrored = {file for file in files if (tests / file.parent / f"test_{file.name}").exists()}
    elsewhere = {Path(file) for file in TESTED_ELSEWHERE}
    untested = sorted(map(str, set(files) - mirrored - elsewhere))
    assert not untested, f"write tests/<folder>/test_<file>, or say in TESTED_ELSEWHERE where: {untested}"
    outdated = sorted(map(str, elsewhere & mirrored | elsewhere - set(files)))
    assert not outdated, f"take out of TESTED_ELSEWHERE, they have a test or are gone: {outdated}"
    missing = sorted(test for test in TESTED_ELSEWHERE.values() if not (tests / test).exists())
    assert not missing


def test_no_file_is_named_after_nothing():
    empty_names = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [str(path) for path in SOURCES if path.name in empty_names]


def test_tests_do_not_import_each_other():
    tests = (ROOT / "tests").rglob("test_*.py")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in tests
        for node, name in imports_of(parse(path))
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert not found


@pytest.mark.parametrize(
    ("rule", "file", "code", "message"),
    [
        (upward_imports, "models/vlm.py", "import megatron_vlm.training.run", "models must not import training"),
        (
            upward_imports,
            "models/vlm.py",
            "from megatron_vlm.data.loading.batch import X",
            "models must not import data",
        ),
        (upward_imports, "data/a.py", "def f():\n    from megatron_vlm import models", "data must not import models"),
        (upward_imports, "data/a.py", "from .packing import x", "imports are absolute"),
        (
            imports_between_rooms,
            "data/plan/plan.py",
            "from megatron_vlm.data.shards.dataset import X",
            "data/plan must not import data/shards",
        ),
        (
            imports_between_rooms,
            "data/samples.py",
            "from megatron_vlm.data.text.tokenizer import X",
            "data/samples must not import data/text",
        ),
        (files_outside_of_rooms, "data/packing.py", "", "data has the rooms"),
        (files_outside_of_rooms, "data/misc/a.py", "", "data has the rooms"),
        (torch_where_it_is_not_needed, "data/images/decoding.py", "import torch", "data must not import torch"),
        (torch_where_it_is_not_needed, "costs/flops.py", "import torch", "costs must not import torch"),
        (
            framework_imports,
            "data/plan/plan.py",
            "from megatron.core import mpu",
            "data must not import megatron.core.mpu",
        ),
        (framework_imports, "data/plan/plan.py", "import torch.cuda", "data must not import torch.cuda"),
        (prints, "data/plan/plan.py", "print('x')", "does not print"),
        (torch_patches, "models/vlm.py", "torch.cuda.synchronize = f", "only megatron_vlm/platform/host.py and"),
        (torch_patches, "platform/device.py", "torch.empty = f", "only megatron_vlm/platform/host.py and"),
        (torch_patches, "models/vlm.py", "setattr(torch, 'empty', f)", "only megatron_vlm/platform/host.py and"),
        (environment_reads, "training/run.py", "x = os.environ['RANK']", "only cli and platform read"),
    ],
)
def test_rule_finds_what_it_is_for(rule, file, code, message):
    (violation,) = rule(ROOT / PACKAGE / file, ast.parse(code))
    assert violation.startswith(f"{file}:")
    assert message in violation


@pytest.mark.parametrize(
    ("rule", "file", "code"),
    [
        (upward_imports, "models/vlm.py", "from megatron_vlm.config import ModelConfig"),
        (upward_imports, "models/vlm.py", "from megatron_vlm.models.layers.norm import Norm"),
        (upward_imports, "models/vlm.py", "import torch, megatron.core"),
        (imports_between_rooms, "data/plan/plan.py", "from megatron_vlm.data.samples import EncodedSample"),
        (imports_between_rooms, "data/plan/plan.py", "from megatron_vlm.data.plan.packing import X"),
        (files_outside_of_rooms, "data/rejects.py", ""),
        (files_outside_of_rooms, "data/plan/packing.py", ""),
        (torch_where_it_is_not_needed, "data/loading/pixels.py", "import torch"),
        (framework_imports, "data/loading/collate.py", "import torch"),
        (prints, "cli/data.py", "print('x')"),
        (torch_patches, "platform/host.py", "torch.cuda.synchronize = f"),
        (torch_patches, "platform/fake_device/device.py", "torch.cuda.synchronize = f"),
        (environment_reads, "cli/train.py", "os.environ['X']"),
    ],
)
def test_rule_leaves_what_is_allowed(rule, file, code):
    assert not list(rule(ROOT / PACKAGE / file, ast.parse(code)))
