import json

import numpy as np
import pytest
from PIL import Image

from tests.support.configs import tiny_model
from tests.support.project import make_project
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project; every test uses a run_dir of its own."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run and questions about three pictures."""
    folder = tmp_path_factory.mktemp("inference")
    write_random_run(folder / "run", tiny_model(vocab_size=NUM_PIECES), train_sentence_piece(folder))
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows += [
            {"question_id": f"{number}/{turn}", "image": f"{number}.png", "question": f"what {turn}?", "answer": "red"}
            for turn in range(4)
        ]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder
