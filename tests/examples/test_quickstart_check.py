import json
from pathlib import Path
from typing import Any

import pytest
from quickstart.check import accuracy_by_kind, check_bars, check_resume, describe, guess, summarise
from quickstart.logits import choose_samples


def make_run(first: int, last: int, seconds: float = 0.5) -> list[dict[str, Any]]:
    return [
        {
            "iteration": iteration,
            "loss_hex": (1.0 / iteration).hex(),
            "grad_norm_hex": (2.0 / iteration).hex(),
            "tokens": 1500,
            "padding": 0.25,
            "seconds": seconds,
        }
        for iteration in range(first, last + 1)
    ]


def make_resumed() -> list[dict[str, Any]]:
    """A folder's records after a kill at 18 and a second start from 10, which ran a little slower."""
    return make_run(1, 10) + make_run(11, 40, seconds=0.6)


GOOD = {
    "accuracy": 0.9,
    "shapes": 0.85,
    "blind": 0.6,
    "resume": check_resume(make_run(1, 25), make_run(1, 18), make_resumed()),
    "exit_code": 1,
    "difference": 2e-5,
}


def test_resumed_run_is_bit_equal_where_all_losses_agree() -> None:
    check = check_resume(make_run(1, 25), make_run(1, 18), make_resumed())
    assert check.bit_equal
    assert (check.killed_after, check.resumed_from, check.iterations_compared) == (18, 10, 25)


@pytest.mark.parametrize("run", ["killed", "resumed"])
def test_one_bit_of_difference_on_either_side_of_the_kill_is_found(run: str) -> None:
    runs = {"killed": make_run(1, 18), "resumed": make_resumed()}
    changed = next(record for record in runs[run] if record["iteration"] == 15)
    changed["grad_norm_hex"] = (2.0 / 15 * (1 + 2**-52)).hex()
    check = check_resume(make_run(1, 25), runs["killed"], runs["resumed"])
    assert not check.bit_equal
    assert check.iterations_different == (15,)


def test_comparison_that_ends_before_the_kill_proves_nothing() -> None:
    assert not check_resume(make_run(1, 18), make_run(1, 18), make_resumed()).bit_equal


def test_second_start_from_the_beginning_is_no_resume() -> None:
    check = check_resume(make_run(1, 25), make_run(1, 18), make_run(1, 40, seconds=0.6))
    assert not check.bit_equal
    assert check.resumed_from == 0


def test_all_bars_are_met_by_good_findings() -> None:
    assert [bar["met"] for bar in check_bars(**GOOD, smoke=False)] == [True] * 6


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"accuracy": 0.89}, "accuracy on the test split"),
        ({"shapes": 0.84}, "accuracy of shapes"),
        ({"blind": 0.63}, "accuracy when shown another test picture"),
        ({"resume": check_resume([], [], [])}, "losses of the resumed run equal the uninterrupted run's"),
        ({"exit_code": 0}, "a killed rank ends the whole job with a non-zero exit code"),
        ({"difference": float("inf")}, "largest difference of logits in transformers"),
        ({"difference": float("nan")}, "largest difference of logits in transformers"),
    ],
)
def test_each_missed_bar_is_named(changes: dict[str, Any], missed: str) -> None:
    bars = check_bars(**{**GOOD, **changes}, smoke=False)
    assert [bar["name"] for bar in bars if not bar["met"]] == [missed]


def test_smoke_run_is_not_held_against_accuracy() -> None:
    assert all(bar["met"] for bar in check_bars(**{**GOOD, "accuracy": 0.1, "shapes": 0.1, "blind": 0.9}, smoke=True))


def learn(*rows: tuple[str, str]) -> list[tuple[str, str, int]]:
    return [(text, answer, number) for number, (text, answer) in enumerate(rows)]


def ask(*rows: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"question": text, "answers": [answer]} for text, answer in rows]


def test_most_frequent_answer_is_that_of_the_training_split() -> None:
    training = learn(("a", "yes"), ("b", "yes"), ("c", "no"))
    assert guess(training, ask(("a", "no"), ("b", "no"), ("c", "no"), ("d", "yes")))["most_frequent_answer"] == 0.25


def test_most_frequent_answer_per_question_follows_the_text() -> None:
    training = learn(("a", "no"), ("a", "no"), ("b", "yes"), ("b", "yes"), ("b", "yes"))
    assert guess(training, ask(("a", "no"), ("b", "yes")))["most_frequent_answer_per_question"] == 1.0


def test_unknown_question_gets_the_overall_answer() -> None:
    training = learn(("a", "no"), ("b", "yes"), ("b", "yes"))
    assert guess(training, ask(("new", "yes")))["most_frequent_answer_per_question"] == 1.0


def test_accuracy_is_told_for_each_kind_of_question() -> None:
    answers = [("yes", True), ("red", True), ("circle", False), ("no", False)]
    rows = [{"answers": [answer], "exact_match": match} for answer, match in answers]
    assert accuracy_by_kind(rows) == {"yes or no": 0.5, "color": 1.0, "shape": 0.0}


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the steps of a good run leave behind."""
    split = tmp_path / "downloads" / "easy_vqa-1.0" / "easy_vqa" / "data" / "train"
    split.mkdir(parents=True)
    (split / "questions.json").write_text(json.dumps([["a", "yes", 0]]))
    monkeypatch.setattr("quickstart.check.DOWNLOADS", tmp_path / "downloads")
    folder = tmp_path / "output"
    runs = {"align": make_run(1, 5), "pretrain": make_resumed(), "sft": make_run(1, 5)}
    for name, records in {**runs, "pretrain_straight": make_run(1, 25)}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [{"answers": ["circle"], "exact_match": 1.0}]
    files: dict[str, Any] = {
        "pretrain_killed": {"rank": 1, "exit_code": 1, "seconds_to_end": 2.5, "killed": make_run(1, 18)},
        "evaluate": {"exact_match": 0.9, "answers": rows},
        "evaluate_another_picture": {"exact_match": 0.6, "answers": rows},
        "logits": [{"max_difference": 1e-6}, {"max_difference": 3e-6}],
        "raw/test": ask(("a", "yes")),
    }
    (folder / "raw").mkdir()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "done").mkdir()
    (folder / "done" / "align").write_text("30\n")
    return folder


def test_summary_has_what_the_steps_found(output: Path) -> None:
    summary = summarise(output, smoke=False)
    assert summary["passed"]
    assert (summary["test_accuracy"], summary["controls"]["other_picture"]) == (0.9, 0.6)
    assert summary["resume_bit_equal"]
    assert summary["max_logit_difference"] == 3e-6
    assert summary["packing_utilisation"] == pytest.approx({"align": 0.75, "pretrain": 0.75, "sft": 0.75})
    assert (summary["seconds"], summary["seconds_total"]) == ({"align": 30.0}, 30.0)


def test_last_lines_tell_every_bar_and_where_the_reports_are(output: Path) -> None:
    summary = summarise(output, smoke=False)
    text = describe(summary, output)
    assert text.count("met    ") == 6
    assert f"report: {output / 'sft' / 'report.html'}" in text
    summary["requirements"][0]["met"] = False
    assert "MISSED accuracy on the test split: 0.9000 (required: >= 0.90)" in describe(summary, output)


def test_logits_are_compared_on_one_to_three_pictures_of_the_whole_split() -> None:
    items = [{"image": f"{number}.png", "question": f"question {number}"} for number in range(80)]
    samples = choose_samples(items)
    assert [len(images) for images, _ in samples] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert all(len(set(images)) == len(images) for images, _ in samples)
    assert [question for _, question in samples] == [f"question {number}" for number in range(0, 80, 10)]
