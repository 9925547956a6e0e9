import json

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece

MODEL = tiny_model(vocab_size=NUM_PIECES)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run and questions about three pictures."""
    folder = tmp_path_factory.mktemp("inference")
    write_random_run(folder / "run", MODEL, train_sentence_piece(folder))
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


def evaluate(place, output, *options):
    arguments = [str(place / "run"), "--task", "vqa", "--questions", str(place / "questions.json")]
    code = main(["evaluate", *arguments, "--output", str(output), "--max-new-tokens", "5", *options])
    return code, json.loads(output.read_text()) if output.exists() else None


def test_evaluate_writes_scores_and_answers(place, tmp_path, capsys):
    code, record = evaluate(place, tmp_path / "out.json")
    assert code == 0
    assert (record["num_questions"], record["num_shots"]) == (12, 0)
    assert {"accuracy", "exact_match", "seconds", "checkpoint"} <= set(record)
    assert [row["question_id"] for row in record["answers"]] == [f"{n}/{t}" for n in range(3) for t in range(4)]
    assert "vqa: 12 questions, 0 shots: accuracy" in capsys.readouterr().out


def test_evaluate_twice_gives_the_same_answers(place, tmp_path):
    records = [
        evaluate(place, tmp_path / f"{i}.json", "--batch-positions", str(size))[1] for i, size in enumerate((1, 5000))
    ]
    assert records[0]["answers"] == records[1]["answers"]


def test_swapped_images_are_recorded_and_change_answers(place, tmp_path):
    _, own = evaluate(place, tmp_path / "own.json")
    _, other = evaluate(place, tmp_path / "other.json", "--swap-images", "0")
    assert other["swap_images"] == 0
    assert all(a["images"] != b["images"] for a, b in zip(own["answers"], other["answers"], strict=True))
    assert [row["prediction"] for row in own["answers"]] != [row["prediction"] for row in other["answers"]]


def test_shots_come_from_a_file(place, tmp_path):
    code, record = evaluate(place, tmp_path / "out.json", "--shots", "2", "--shots-from", str(place / "questions.json"))
    assert code == 0
    assert record["num_shots"] == 2


def test_limit_spreads_over_the_file(place, tmp_path):
    _, record = evaluate(place, tmp_path / "out.json", "--limit", "3")
    assert [row["question_id"] for row in record["answers"]] == ["0/0", "1/0", "2/0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "2"], "--shots 2 and --shots-from belong together"),
        (["--limit", "0"], "argument --limit: 0 is below 1"),
        (["--batch-positions", "0"], "argument --batch-positions: 0 is below 1"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is below 1"),
    ],
)
def test_evaluate_refuses_options_that_make_no_sense(options, message, place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out.json", *options) == (64, None)
    assert message in capsys.readouterr().err


def test_evaluate_needs_a_folder_to_write_to(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "none" / "out.json")[0] == 64
    assert "none does not exist" in capsys.readouterr().err


def test_an_unknown_template_is_a_wrong_command_line(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out.json", "--template", "x")[0] == 64
    assert "argument --template: invalid choice: 'x' (choose from" in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(place, tmp_path, capsys):
    write_random_run(tmp_path / "run", tiny_model(vocab_size=NUM_PIECES + 1), place / "tokenizer.model")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 78
    assert f"tokenizer has {NUM_PIECES} pieces, the model {NUM_PIECES + 1}" in capsys.readouterr().err


def generate(place, capsys, *options) -> str:
    arguments = ["generate", str(place / "run"), "--max-new-tokens", "8", *options]
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_generate_looks_at_the_picture(place, capsys):
    said = {
        generate(place, capsys, "--image", str(place / f"{number}.png"), "--prompt", "what is it?")
        for number in range(3)
    }
    assert len(said) == 3


def test_generate_puts_pictures_first_where_no_placeholder_stands(place, capsys):
    picture = ["--image", str(place / "0.png")]
    without = generate(place, capsys, *picture, "--prompt", "what is it?")
    assert generate(place, capsys, *picture, "--prompt", "<image>\nwhat is it?") == without
    assert generate(place, capsys, *picture, "--prompt", "what is <image>?") != without


def test_generate_draws_by_the_seed(place, capsys):
    options = ["--prompt", "what?", "--temperature", "2", "--top-p", "0.95", "--top-k", "200"]
    first, again, other = (generate(place, capsys, *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_continues_bare_text(place, capsys):
    bare = generate(place, capsys, "--prompt", "A chat", "--template", "none")
    assert bare != generate(place, capsys, "--prompt", "A chat")


def test_generate_names_a_missing_picture(place, capsys):
    assert main(["generate", str(place / "run"), "--image", "nowhere.png", "--prompt", "x"]) == 65
    assert "image cannot be read: No such file or directory (nowhere.png)" in capsys.readouterr().err


def test_generate_refuses_sampling_that_makes_no_sense(place, capsys):
    assert main(["generate", str(place / "run"), "--prompt", "x", "--top-p", "0"]) == 64
    assert "--top-p 0.0 is out of range" in capsys.readouterr().err
