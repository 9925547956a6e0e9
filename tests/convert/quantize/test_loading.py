"""Quantised folders in programs that nobody here wrote, in an environment of their own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.convert.quantize.export import QuantizeOptions
from megatron_vlm.convert.quantize.groups import Grid, quantise
from megatron_vlm.convert.quantize.layout import find_layout
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from tests.support.llava_logits import load_llava
from tests.support.quantized import dequantised

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("VENV_QUANTISED", ROOT / ".venv-quantised")) / "bin/python"
# gptqmodel compiles its kernel at first use, which takes minutes.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs bash tests/convert/setup_quantised.sh"),
]
SCRIPTS = ROOT / "tests" / "support"
IDS = torch.randint(3, 400, (64,), generator=torch.Generator().manual_seed(4))


def run(script: Path, *arguments: Path, given: str = "") -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, script, *arguments], input=given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def logits(make_run, model_config, calibration, tmp_path):
    """Return logits as transformers 5 loads the folder, and those of its dequantised weights by type, and the class."""

    def compute(method: str):
        options = QuantizeOptions(method=method, calibration=calibration, group_size=32)
        export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", ExportOptions(quantize=options))
        run(SCRIPTS / "quantised_door.py", tmp_path / "hf", tmp_path / "logits.pt", given=json.dumps(IDS.tolist()))
        found = torch.load(tmp_path / "logits.pt")
        weights = dequantised(load_file(tmp_path / "hf" / "model.safetensors"), find_layout(method, None), 32)
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        del config["quantization_config"]
        plain = tmp_path / "plain"
        plain.mkdir()
        (plain / "config.json").write_text(json.dumps(config))
        save_file(
            {name: one.float().contiguous() for name, one in weights.items()},
            plain / "model.safetensors",
            metadata={"format": "pt"},
        )
        by_type = {}
        with torch.no_grad():
            for dtype in (torch.float32, torch.float16):
                by_type[dtype] = load_llava(plain).to(dtype)(input_ids=IDS[None]).logits[0].float()
        return found["logits"], by_type, found["module"]

    return compute


def test_transformers_computes_with_gemm_what_the_weights_in_float16_do(logits):
    theirs, ours, module = logits("awq")
    assert "Awq" in module
    rounding = (ours[torch.float16] - ours[torch.float32]).abs().max()
    # The kernel rounds its products, too, hence the 3. An error of packing is of the order of the logits.
    assert (theirs - ours[torch.float32]).abs().max() <= 3 * rounding
    assert rounding < 0.01 * ours[torch.float32].abs().max()


def test_transformers_computes_with_compressed_tensors_what_the_weights_do(logits):
    theirs, ours, _ = logits("compressed-tensors")
    assert (theirs - ours[torch.float32]).abs().max() <= 2e-5


def test_gptqmodel_packs_and_unpacks_alike(tmp_path):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    matrix = quantise(weight, 64, Grid(is_symmetric=False), torch.float16)
    gemm = find_layout("awq", "gemm").pack(matrix)
    torch.save({"values": matrix.values, "gemm": gemm, "group_size": 64}, tmp_path / "given.pt")
    run(SCRIPTS / "quantised_peers.py", tmp_path / "given.pt", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["tinychat"], find_layout("awq", "tinychat").pack(matrix)["qweight"])
    assert torch.equal(found["weight"].T.float(), matrix.dequantise().half().float())
