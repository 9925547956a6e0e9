"""lmms-eval's adapter `llava_hf` answers questions of easy-vqa as `evaluate` does.

Its own tasks need a hub; here the adapter gets the questions themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.cli.main import main
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.data.text.templates import find_system
from tests.serving.reference import ROOT

pytestmark = pytest.mark.slow

NUM_QUESTIONS, NUM_TOKENS = 50, 8


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions of the test split, from easy-vqa's wheel."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    script = (
        "import sys; from pathlib import Path; import corpora; from wheels import fetch\n"
        "(package, sha256), = corpora.PACKAGES.items(); folder = Path(sys.argv[1])\n"
        "data = fetch(package, sha256, folder) / 'easy_vqa' / 'data' / 'test'\n"
        f"corpora.write_test_questions(data, folder / 'test.json', {NUM_QUESTIONS})\n"
    )
    examples = ROOT / "examples"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, examples, examples / "quickstart")))}
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no questions: {done.stderr.strip().splitlines()[-1]}")
    return folder / "test.json"


def test_the_adapter_gives_the_answers_of_evaluate(python_of, questions, tmp_path):
    python = python_of("lmms_eval")
    trained = Path(os.environ.get("QUICKSTART", ROOT / "runs" / "quickstart")) / "sft"
    if not trained.is_dir():
        # A random one answers in bytes that are no text, which transformers and SentencePiece write in different ways.
        pytest.skip(f"needs a trained model: {trained} does not exist; run examples/quickstart, or use --quickstart")
    export_model(read_run_settings(trained), tmp_path / "hf", ExportOptions(system=find_system("none")))
    command = ["evaluate", str(trained), "--task", "vqa", "--questions", str(questions), "--system", "none"]
    assert main([*command, "--max-new-tokens", str(NUM_TOKENS), "--output", str(tmp_path / "ours.json")]) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["answers"]
    asked = [{"text": one["question"], "images": one["images"], "max_new_tokens": NUM_TOKENS} for one in ours]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    script = Path(__file__).parent / "servers" / "lmms_eval_answers.py"
    files = [str(tmp_path / name) for name in ("hf", "questions.json", "theirs.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([python, str(script), *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [answer.strip() for answer in json.loads((tmp_path / "theirs.json").read_text())]
    assert len(found) == NUM_QUESTIONS
    assert found == [one["prediction"] for one in ours]
