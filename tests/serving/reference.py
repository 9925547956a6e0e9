"""Prompts with pictures, and the answers of this project: greedy tokens with their log-probabilities."""

import base64
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.config import ModelConfig
from megatron_vlm.config.inference import ModelOptions, SamplingOptions
from megatron_vlm.evaluation.answer import Prompt
from megatron_vlm.evaluation.opened_model import opened_model
from megatron_vlm.evaluation.prompts import Exchange
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 16
_QUESTIONS = (
    "What colour is the circle?",
    "Is there a triangle in the picture?",
    "How many shapes are on the left side?",
    "Compare 2 pictures: which one is darker?",
    "été 你好 😀, what is this?",
    "A man reads  the newspaper\nunder a tree.",
    "Question: yes or no, black or white?",
    "one two three four five",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A text and the pictures before it, which have the size that the model sees: nothing resizes them."""

    text: str
    pictures: tuple[Path, ...]

    @property
    def content(self) -> list[dict]:
        """The content of a message to a chat endpoint."""
        return [
            *({"type": "image_url", "image_url": {"url": _data_url(path)}} for path in self.pictures),
            {"type": "text", "text": self.text},
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens."""

    prompt_ids: list[int]
    """With each placeholder of an image."""
    ids: list[int]
    """NUM_TOKENS of them, also where the answer ends sooner."""
    length: int
    """Tokens up to the end of the answer, which are those of `generate`."""
    text: str
    """Of these."""
    logprobs: torch.Tensor
    """float[n, v] at each token."""

    @property
    def chosen(self) -> torch.Tensor:
        """float[n] of the tokens themselves."""
        return self.logprobs[torch.arange(len(self.ids)), torch.tensor(self.ids)]

    @property
    def margins(self) -> torch.Tensor:
        """float[n], by how much each token leads before the next one."""
        best = self.logprobs.topk(2).values
        return best[:, 0] - best[:, 1]


def write_run(folder: Path, model: ModelConfig) -> Path:
    """Write a run with random weights and a tokenizer."""
    tokenizer = train_sentence_piece(folder)
    language = replace(model.language, vocab_size=NUM_PIECES)
    write_random_run(folder / "run", replace(model, language=language), tokenizer)
    return folder / "run"


def make_questions(folder: Path, image_size: int) -> list[Question]:
    """Return 8 questions about 1 to 3 pictures each."""
    random, made = np.random.default_rng(7), []
    for number, text in enumerate(_QUESTIONS):
        pictures = []
        for place in range(1 + number % 3):
            pictures.append(folder / f"{number}-{place}.png")
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((image_size, image_size), Image.Resampling.BILINEAR).save(pictures[-1])
        made.append(Question(text, tuple(pictures)))
    return made


def answer(run: Path, questions: list[Question]) -> list[Answer]:
    """Answer questions with this project's own code.

    The prompt has a line break after each picture, as the chat template writes it.
    """
    answers, settings = [], read_run_settings(run)
    with opened_model(str(run), ModelOptions(), torch.device("cpu")) as opened:
        options = SamplingOptions(max_new_tokens=NUM_TOKENS)
        for question in questions:
            text = "<image>\n" * len(question.pictures) + question.text
            prompt_ids = opened.prompt_format.encode([Exchange(text, len(question.pictures))])
            pixels = opened.reader.read(list(question.pictures))
            features = opened.generator.encode_images(pixels)
            prompt = Prompt(prompt_ids, tuple(range(len(question.pictures))))
            ids = next(opened.generator.generate([prompt], features, options)).ids
            answers.append((prompt_ids.tolist(), pixels, ids, opened.prompt_format.tokenizer.decode(ids)))
    with open_model(settings) as model:
        return [
            _continue(Answer(prompt, ids, len(ids), text, torch.empty(0)), model, settings.model, pixels)
            for prompt, pixels, ids, text in answers
        ]


def _continue(found: Answer, model, config: ModelConfig, pixels: np.ndarray) -> Answer:
    """Add the most likely tokens behind the end of an answer, and the log-probabilities of all."""
    ids = list(found.ids)
    while len(ids) < NUM_TOKENS:
        ids.append(int(_logprobs(model, config, found.prompt_ids, pixels, [*ids, 0])[-1].argmax()))
    return replace(found, ids=ids, logprobs=_logprobs(model, config, found.prompt_ids, pixels, ids))


@torch.inference_mode()
def _logprobs(model, config: ModelConfig, prompt: list[int], pixels: np.ndarray, ids: list[int]) -> torch.Tensor:
    whole = torch.tensor([prompt + ids])
    index = (whole[0] == config.language.image_token_id).nonzero()[:, 0]
    logits = model(whole, torch.from_numpy(pixels), index, num_images=len(pixels))
    ours = logits[0, len(prompt) - 1 : -1].float()
    # A server has the rows of image and padding, too, which hold the mean of the others, and so have their mean logit.
    added = ours.mean(-1, keepdim=True).expand(-1, config.language.num_token_ids - ours.size(-1))
    return torch.cat([ours, added], dim=-1).log_softmax(-1).clone()


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
