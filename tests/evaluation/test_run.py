import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config import DataError, UsageError
from megatron_vlm.config.inference import EvaluationOptions
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.evaluation import run as evaluation
from megatron_vlm.evaluation.answer import Answer
from megatron_vlm.evaluation.opened_model import OpenedModel
from megatron_vlm.evaluation.pictures import PictureReader
from megatron_vlm.evaluation.prompts import PromptFormat
from megatron_vlm.evaluation.questions import Question
from megatron_vlm.evaluation.run import choose_asked, evaluate
from tests.support.configs import tiny_model
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

MODEL = tiny_model(vocab_size=NUM_PIECES)
GREYS = {"black": 0, "grey": 128, "white": 255}


class SeeingGenerator:
    """Stands for a model that names the grey of the last picture of a prompt."""

    feature_bytes = 1000

    def __init__(self, tokenizer):
        self.tokenizer, self.encoded, self.prompts = tokenizer, 0, []

    def encode_images(self, pixels):
        self.encoded += len(pixels)
        return torch.from_numpy(pixels).float().mean((1, 2, 3))

    def generate(self, prompts, features, options):
        for number, prompt in reversed(list(enumerate(prompts))):
            self.prompts.append(prompt)
            grey = features[prompt.images[-1]].item()
            word = min(GREYS, key=lambda name: abs(GREYS[name] - grey))
            yield Answer(number, self.tokenizer.encode(word))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_sentence_piece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def ask(tokenizer, tmp_path):
    """Run the task vqa on questions: ask(questions, options=..., pool=...) -> (result, generator)."""
    generator = SeeingGenerator(tokenizer)
    prompt_format = PromptFormat(tokenizer=tokenizer, model=MODEL, template=TEMPLATES["vicuna_v1"], system=None)

    def run(questions, options=None, pool=()):
        model = OpenedModel(generator, prompt_format, PictureReader(MODEL.vision, "pad"), "checkpoint")
        options = options or EvaluationOptions()
        result = evaluate("vqa", choose_asked(questions, options, pool), model, options=options)
        return result, generator

    return run


@pytest.fixture
def questions(tmp_path):
    """Two questions about each of three pictures, mixed."""
    for name, grey in GREYS.items():
        stream = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), grey, dtype=np.uint8)).save(stream, "PNG")
        (tmp_path / f"{name}.png").write_bytes(stream.getvalue())
    return [
        Question(question_id=(turn, name), images=(tmp_path / f"{name}.png",), text=f"what {turn}?", answers=(name,))
        for turn in range(2)
        for name in GREYS
    ]


def test_a_model_that_sees_answers_everything(ask, questions):
    result, _ = ask(questions)
    assert result.summary["exact_match"] == result.summary["accuracy"] == 1.0
    assert [row["question_id"] for row in result.answers] == [question.question_id for question in questions]
    assert [row["prediction"] for row in result.answers] == [question.answers[0] for question in questions]


def test_each_picture_is_encoded_once(ask, questions):
    assert ask(questions)[1].encoded == 3


def test_few_features_are_kept_at_a_time(ask, questions, monkeypatch):
    monkeypatch.setattr(evaluation, "FEATURE_BYTES", 1000)
    result, generator = ask(questions)
    assert result.summary["accuracy"] == 1.0
    assert generator.encoded == 3


def test_shots_put_their_pictures_and_answers_before_the_question(ask, questions, tokenizer):
    result, generator = ask(questions, EvaluationOptions(num_shots=2, suffix=" Say one word."), pool=questions)
    assert result.summary["accuracy"] == 1.0
    for prompt in generator.prompts:
        assert len(set(prompt.images)) == 3
        assert (prompt.input_ids == MODEL.language.image_token_id).sum() == 3 * MODEL.constant_image_tokens
        assert (prompt.input_ids == tokenizer.eos_id).sum() == 2


def test_wrong_answers_count(ask, questions):
    wrong = [Question(question_id=1, images=questions[0].images, text="what?", answers=("green",)), *questions[1:]]
    result, _ = ask(wrong)
    assert result.summary["exact_match"] == pytest.approx(5 / 6)
    assert result.answers[0]["exact_match"] == 0.0


def test_missing_pictures_are_counted_before_anything_is_asked(ask, questions, tmp_path):
    (tmp_path / "black.png").unlink()
    with pytest.raises(DataError, match="1 of 3 images are missing, e.g. .*black.png"):
        ask(questions)


def test_a_damaged_picture_is_named(ask, questions, tmp_path):
    (tmp_path / "black.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="1 of 3 images cannot be read, e.g. .*black.png: image_format"):
        ask(questions)


def test_a_question_without_room_for_an_answer_is_found_before_anything_is_asked(ask, questions, monkeypatch):
    monkeypatch.setattr(evaluation, "FEATURE_BYTES", 1000)
    asked = []
    monkeypatch.setattr(SeeingGenerator, "encode_images", lambda *_: asked.append(1))
    long = Question(question_id=9, images=questions[-1].images, text="what? " * 4096, answers=("white",))
    with pytest.raises(UsageError, match="1 of 7 prompts fill the 4096 positions"):
        ask([*questions, long])
    assert not asked
