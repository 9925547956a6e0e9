"""vLLM on a CPU serves an export through its OpenAI endpoint as this project computes it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.to_hf import export_model
from tests.serving.reference import NUM_TOKENS, ROOT, answer, make_questions

pytestmark = pytest.mark.slow

# Two implementations of the same operations in float32.
TOLERANCE = 1e-3


def runs(make_run, quickstart_model, kind: str) -> Path:
    if kind == "quickstart":
        folder = Path(os.environ.get("QUICKSTART", ROOT / "runs" / "quickstart")) / "sft"
        if not folder.is_dir():
            pytest.skip(f"{folder} does not exist: bash examples/quickstart/run.sh, or name it with --quickstart")
        return folder
    if kind == "linear":
        # Servers take a linear projection where the embeddings are twice as wide as the features.
        vision = replace(quickstart_model.vision, hidden_size=quickstart_model.language.hidden_size // 2)
        return make_run(replace(quickstart_model, vision=vision, projection=make_projector("linear")))
    return make_run(quickstart_model)


@pytest.fixture(scope="module", params=["mlp2x_gelu", "linear", "quickstart"])
def served(request, make_run, quickstart_model, python_of, start, tmp_path_factory):
    """A server, the questions and our answers."""
    python, folder = python_of("vllm"), tmp_path_factory.mktemp("vllm")
    run = runs(make_run, quickstart_model, request.param)
    settings = read_run_settings(run)
    export_model(settings, folder / "hf")
    questions = make_questions(folder, settings.model.vision.image_size)
    options = (
        "--served-model-name",
        "model",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "4",
        "--host",
        "127.0.0.1",
        "--port",
        "PORT",
    )
    server = start(
        [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "hf"), *options],
        PYTHONPATH=str(Path(__file__).parent / "vllm_site"),
        OMP_NUM_THREADS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # by default it binds its threads to cores that may be busy
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TORCHDYNAMO_DISABLE="1",  # the compiler's probes of a busy machine hold the first answer up for minutes
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    return server, questions, answer(run, questions)


def test_the_chat_endpoint_gives_the_ids_the_text_and_the_probabilities_of_our_generate(served):
    server, questions, answers = served
    worst = 0.0
    for question, ours in zip(questions, answers, strict=True):
        found = ask(server, question)
        assert found["prompt_token_ids"] == ours.prompt_ids
        choice = found["choices"][0]
        assert choice["token_ids"][: ours.length] == ours.ids[: ours.length]
        if "\ufffd" not in ours.text:  # bytes that are no text are written in different ways
            assert choice["message"]["content"].strip() == ours.text.strip()
        (beyond,) = ask(server, question, ignore_eos=True)["choices"]
        assert beyond["token_ids"] == ours.ids
        theirs = [entry["logprob"] for entry in beyond["logprobs"]["content"]]
        worst = max([worst, *(abs(one - other) for one, other in zip(ours.chosen.tolist(), theirs, strict=True))])
    print(f"largest difference of {sum(len(one.ids) for one in answers)} log-probabilities: {worst:.1e}")
    assert worst <= TOLERANCE


def ask(server, question, **options) -> dict:
    """Return the answer of the chat endpoint, of at most NUM_TOKENS greedy tokens."""
    return server.post(
        "/v1/chat/completions",
        model="model",
        messages=[{"role": "user", "content": question.content}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=True,
        return_token_ids=True,
        **options,
    )
