"""llama.cpp serves GGUF files through its OpenAI endpoint as this project computes the checkpoint."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.config.towers import siglip
from megatron_vlm.convert.export import export
from megatron_vlm.convert.formats.gguf import TEXT_NAME, VISION_NAME
from megatron_vlm.convert.to_hf import ExportOptions
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.serving.reference import NUM_TOKENS, Question, answer, make_questions
from tests.support.byte_pair import HOSTILE

pytestmark = pytest.mark.slow

# Weights, and activations before each product, in float16; GELU from a table in float16.
TOLERANCE = 2e-2


@pytest.fixture(scope="module", params=["mlp2x_gelu", "linear"])
def served(request, make_run, quickstart_model, python_of, start, tmp_path_factory):
    """A server, the run, the questions and our answers."""
    python, folder = python_of("llama_cpp"), tmp_path_factory.mktemp("llama_cpp")
    sizes = {name: getattr(quickstart_model.vision, name) for name in ("image_size", "patch_size", "hidden_size")}
    vision = siglip.Config(**sizes, num_layers=3, ffn_hidden_size=256, num_attention_heads=4, feature_layer=-2)
    run = make_run(replace(quickstart_model, vision=vision, projection=make_projector(request.param)))
    export(read_run_settings(run), folder / "gguf", ExportOptions(format="gguf", dtype="float16"))
    pictured = make_questions(folder, vision.image_size)
    questions = [*pictured, *(Question(question.text, ()) for question in pictured)]
    script = Path(__file__).parent / "servers" / "llama_cpp.py"
    files = [str(folder / "gguf" / name) for name in (TEXT_NAME, VISION_NAME)]
    server = start([python, str(script), *files, "PORT"], OMP_NUM_THREADS="1")
    return server, run, questions, answer(run, questions)


def test_the_chat_endpoint_gives_the_probabilities_of_our_generate(served):
    """Of text alone and of 1 to 3 pictures; after a token that float16 chooses otherwise the texts differ."""
    server, run, questions, answers = served
    tokenizer, worst, compared = load_tokenizer(read_run_settings(run).tokenizer), 0.0, 0
    for question, ours in zip(questions, answers, strict=True):
        message = {"role": "user", "content": question.content if question.pictures else question.text}
        found = server.post(
            "/v1/chat/completions",
            messages=[message],
            max_tokens=NUM_TOKENS,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
        )
        assert found["usage"]["prompt_tokens"] == len(ours.prompt_ids)
        for place, entry in enumerate(found["choices"][0]["logprobs"]["content"][: len(ours.ids)]):
            if _begins_a_character(tokenizer.piece(ours.ids[place])):
                break
            theirs = {one["id"]: one["logprob"] for one in entry["top_logprobs"]}
            for token, logprob in theirs.items():
                worst = max(worst, abs(logprob - ours.logprobs[place, token].item()))
            compared += len(theirs)
            if entry["id"] != ours.ids[place]:
                assert ours.margins[place] <= 2 * TOLERANCE
                break
    print(f"largest difference of {compared} log-probabilities: {worst:.1e}")
    assert compared >= 2 * 5 * len(questions)
    assert worst <= TOLERANCE


def test_the_probabilities_of_text_at_every_place(served):
    """Each of our tokens again, after those before it; of half a character the server gives the id alone."""
    server, _, questions, answers = served
    worst, compared = 0.0, 0
    for ours in (one for question, one in zip(questions, answers, strict=True) if not question.pictures):
        for place, token in enumerate(ours.ids):
            prompt = ours.prompt_ids + ours.ids[:place]
            found = server.post(
                "/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=10, return_tokens=True
            )
            assert found["tokens"] == [token] or ours.margins[place] <= 2 * TOLERANCE
            for entry in found.get("completion_probabilities", [])[:1]:
                differences = [
                    abs(one["logprob"] - ours.logprobs[place, one["id"]].item()) for one in entry["top_logprobs"]
                ]
                worst, compared = max([worst, *differences]), compared + len(differences)
    print(f"largest difference of {compared} log-probabilities of text: {worst:.1e}")
    assert compared >= 500
    assert worst <= TOLERANCE


def _begins_a_character(piece: str) -> bool:
    """Tell whether a piece is the first byte of several: the server's list has no place for half a character."""
    return re.fullmatch("<0x[C-F].>", piece) is not None


def test_text_is_cut_as_in_training(served):
    server, run, *_ = served
    tokenizer = load_tokenizer(read_run_settings(run).tokenizer)
    for text in filter(None, HOSTILE):
        found = server.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert found == [tokenizer.bos_id, *tokenizer.encode(text)], repr(text)
