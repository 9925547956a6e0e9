from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ParallelConfig
from megatron_vlm.config.inference import SamplingOptions
from megatron_vlm.evaluation import answer as generation
from megatron_vlm.evaluation.answer import Answer, Generator, Prompt
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model, tiny_run

EOS = 2
GREEDY = SamplingOptions(max_new_tokens=10)
# Weights this large make answers that differ from prompt to prompt.
MODEL = tiny_model(init_method_std=0.4)


@pytest.fixture
def model(one_rank):
    model = build_model(MODEL, ParallelConfig(), Computation())[0].eval()
    model.requires_grad_(False)
    return model


def make_generator(model, **settings) -> Generator:
    return Generator(model, MODEL, stop_ids=settings.pop("stop_ids", (EOS,)), **settings)


def make_prompts(count: int, *, num_images: int = 5, seed: int = 0) -> tuple[list[Prompt], np.ndarray]:
    """Return prompts of few lengths with 0 to 2 images each, several about the same image, and the pixels."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        images = tuple(int(image) for image in rng.integers(0, num_images, rng.integers(0, 3)))
        image = [MODEL.language.image_token_id] * MODEL.constant_image_tokens
        ids = [1, 7, 8, *(image * len(images)), *rng.integers(3, 100, rng.integers(2, 5))]
        prompts.append(Prompt(np.array(ids, dtype=np.int64), images))
    return prompts, rng.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)


def answer_all(generator: Generator, prompts, pixels, options=GREEDY) -> list[Answer]:
    answers = list(generator.generate(prompts, generator.encode_images(pixels), options))
    return sorted(answers, key=lambda answer: answer.number)


@torch.no_grad()
def answer_without_cache(model, prompt: Prompt, pixels: np.ndarray, count: int, eos_id: int) -> list[int]:
    """Return the most likely continuation by running the whole sequence again for every token."""
    ids = torch.from_numpy(prompt.input_ids)[None]
    chosen = torch.from_numpy(pixels[list(prompt.images)])
    index = (ids[0] == MODEL.language.image_token_id).nonzero()[:, 0]
    answer: list[int] = []
    while len(answer) < count:
        logits = model(ids, chosen, index, num_images=len(prompt.images))[0, -1, : MODEL.language.vocab_size]
        token = int(logits.argmax())
        if token == eos_id:
            break
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return answer


def test_answers_with_cache_and_batches_equal_decoding_without(model):
    prompts, pixels = make_prompts(24)
    wanted = [answer_without_cache(model, prompt, pixels, 10, EOS) for prompt in prompts]
    answers = answer_all(make_generator(model), prompts, pixels)
    assert [answer.ids for answer in answers] == wanted
    assert len({tuple(ids) for ids in wanted}) > 10, "answers that are all alike prove nothing"


def test_an_answer_ends_at_the_end_token(model):
    prompts, pixels = make_prompts(40)
    full = answer_all(make_generator(model, stop_ids=()), prompts, pixels)
    frequent = max({t for a in full for t in a.ids[1:]}, key=lambda t: sum(t in a.ids for a in full))
    answers = answer_all(make_generator(model, stop_ids=(frequent,)), prompts, pixels)
    for answer, whole in zip(answers, full, strict=True):
        cut = whole.ids.index(frequent) if frequent in whole.ids else len(whole.ids)
        assert answer.ids == whole.ids[:cut]
    assert any(len(answer.ids) < len(whole.ids) for answer, whole in zip(answers, full, strict=True))


def test_an_answer_ends_at_the_last_position_of_the_model(model):
    prompts, pixels = make_prompts(6)
    config = tiny_model(init_method_std=0.4, max_position_embeddings=50)
    endless = replace(GREEDY, max_new_tokens=10**12)
    answers = answer_all(Generator(model, config, stop_ids=()), prompts, pixels, endless)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(prompt.input_ids) + len(answer.ids) == 50


def test_the_size_of_batches_does_not_change_answers(model):
    prompts, pixels = make_prompts(30)
    answers = [answer_all(make_generator(model, positions_per_batch=size), prompts, pixels) for size in (1, 100, 10**6)]
    assert answers[0] == answers[1] == answers[2]


def test_a_beginning_that_prompts_share_is_seen_once(model, monkeypatch):
    prompts, pixels = make_prompts(30, num_images=2)
    prompts = [prompt for prompt in prompts if len(prompt.images) == 1]
    seen = []
    forward = Generator._forward
    monkeypatch.setattr(
        Generator, "_forward", lambda self, inputs, context: _count(seen, forward, self, inputs, context)
    )
    shared = answer_all(make_generator(model), prompts, pixels)
    monkeypatch.setattr(Generator, "_shared_length", lambda self, prompt: 0)
    whole = answer_all(make_generator(model), prompts, pixels)
    assert shared == whole
    first_rows = [rows for length, rows in seen if length == 3 + MODEL.constant_image_tokens]
    assert set(first_rows) <= {1, 2}
    assert first_rows


def _count(seen, forward, self, inputs, context):
    seen.append(tuple(inputs.hidden.shape[:2]))
    return forward(self, inputs, context)


def test_images_stand_where_the_prompt_has_them(model):
    prompts, pixels = make_prompts(60)
    two = next(prompt for prompt in prompts if len(set(prompt.images)) == 2)
    swapped = replace(two, images=two.images[::-1])
    generator = make_generator(model)
    answers = answer_all(generator, [two, swapped], pixels)
    assert answers[0].ids == answer_without_cache(model, two, pixels, 10, EOS)
    assert answers[1].ids == answer_without_cache(model, swapped, pixels, 10, EOS)
    assert answers[0].ids != answers[1].ids


def test_ids_beyond_the_vocabulary_are_never_said(model):
    with torch.no_grad():
        model.language_model.output_layer.weight[MODEL.language.vocab_size :] *= 100
    prompts, pixels = make_prompts(20)
    options = SamplingOptions(max_new_tokens=10, temperature=3.0)
    for answer in answer_all(make_generator(model), prompts, pixels, options):
        assert all(token < MODEL.language.vocab_size for token in answer.ids)


def test_draws_depend_on_the_seed_and_not_on_the_batch(model):
    prompts, pixels = make_prompts(20)
    options = SamplingOptions(max_new_tokens=6, temperature=1.0, seed=3)
    small = answer_all(make_generator(model, positions_per_batch=1), prompts, pixels, options)
    large = answer_all(make_generator(model), prompts, pixels, options)
    other = answer_all(make_generator(model), prompts, pixels, replace(options, seed=4))
    assert small == large
    assert large != other


def test_a_large_cache_means_smaller_batches(model, monkeypatch):
    monkeypatch.setattr(generation, "CACHE_BYTES", 2 * 4 * 4 * 2 * 16 * 50)  # 50 positions of this model
    prompts, pixels = make_prompts(10)
    assert make_generator(model)._positions_per_batch == 50
    assert answer_all(make_generator(model), prompts, pixels) == answer_all(
        make_generator(model, positions_per_batch=1), prompts, pixels
    )


@pytest.mark.distributed
def test_a_checkpoint_of_two_by_two_ranks_says_the_same(workers, tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"")
    whole = tiny_run(str(tmp_path / "whole"), model=MODEL)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    sharded = tiny_run(str(tmp_path / "sharded"), model=MODEL, parallel=layout)
    workers.run("tests.support.jobs:save_initial", 1, config=whole)
    workers.run("tests.convert.jobs:save_again", 4, config=sharded, weights=whole.run_dir)
    answers = []
    for run in (whole, sharded):
        settings = read_run_settings(run.run_dir, tokenizer=str(tokenizer))
        prompts, pixels = make_prompts(20)
        with open_model(settings) as opened:
            answers.append(answer_all(Generator(opened, MODEL, stop_ids=(EOS,)), prompts, pixels))
    assert answers[0] == answers[1]
