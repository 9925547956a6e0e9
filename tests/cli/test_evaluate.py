import json

import pytest

from megatron_vlm.cli.main import main


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


def test_a_damaged_image_is_found_before_the_model_is_loaded(place, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (tmp_path / "q.json").write_text('[{"question_id": 1, "image": "a.png", "question": "?", "answer": 3}]')
    arguments = ["evaluate", "no-such-run", "--questions", str(tmp_path / "q.json"), "--output", str(tmp_path / "o")]
    assert main(arguments) == 65
    assert "1 of 1 images cannot be read, e.g." in capsys.readouterr().err


def test_an_unknown_template_is_a_wrong_command_line(place, tmp_path, capsys):
    assert evaluate(place, tmp_path / "out.json", "--template", "x")[0] == 64
    assert "argument --template: invalid choice: 'x' (choose from" in capsys.readouterr().err
