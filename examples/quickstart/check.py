"""Check the results of the quickstart against its bars, print them and write `summary.json`.

    python -m quickstart.check OUTPUT [--smoke]

The exit code is 0 only if every bar is met. A smoke run is too short for the bars on accuracy.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from megatron_vlm.training.run_records import Record, read_run
from quickstart.corpora import COLORS, DOWNLOADS, SHAPES, read_questions

MIN_ACCURACY = 0.90
MIN_SHAPE_ACCURACY = 0.85  # of the questions whose answer is a shape
MAX_BLIND = 0.62  # a model that answers better than this about wrong pictures does not look at them
MAX_DIFFERENCE = 1e-4  # of logits in float32
STAGES = ("align", "pretrain", "sft")
_bits = itemgetter("loss_hex", "grad_norm_hex")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCheck:
    """A killed and resumed run compared with an uninterrupted one."""

    killed_after: int  # last iteration that the killed run logged
    resumed_from: int  # iteration of the checkpoint that was resumed
    iterations_compared: int  # iterations that both runs have
    iterations_different: tuple[int, ...]  # iterations whose loss or gradient norm differs in any bit
    bit_equal: bool  # the run resumed, iterations on both sides of the kill were compared, and none differs


def check_resume(straight: Sequence[Record], killed: Sequence[Record], final: Sequence[Record]) -> ResumeCheck:
    """Compare loss and gradient norm, to the last bit, over all iterations of the uninterrupted run.

    `killed` holds the records written before the kill and `final` those in the same folder after the resumed run, which
    keeps the earlier ones up to its checkpoint. A record that differs, in its seconds at least, was written after it.
    """
    first = {record["iteration"]: record for record in killed}
    resumed = [record for record in final if first.get(record["iteration"]) != record]
    expected = {record["iteration"]: _bits(record) for record in straight}
    # An iteration that ran on both sides of the kill is compared twice.
    found = [(one["iteration"], _bits(one)) for one in (*killed, *resumed) if one["iteration"] in expected]
    different = tuple(sorted({iteration for iteration, bits in found if bits != expected[iteration]}))
    killed_after = max(first, default=0)
    resumed_from = min((record["iteration"] for record in resumed), default=1) - 1
    crossed = any(iteration > killed_after for iteration, _ in found)
    return ResumeCheck(
        killed_after=killed_after,
        resumed_from=resumed_from,
        iterations_compared=len({iteration for iteration, _ in found}),
        iterations_different=different,
        bit_equal=resumed_from > 0 and crossed and not different,
    )


def guess(training: Sequence[tuple[str, str, int]], test: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the accuracy of two strategies that answer without looking, both learned from the training split."""
    overall = Counter(answer for _, answer, _ in training)
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer, _ in training:
        by_text[text][answer] += 1

    def accuracy(counts: Callable[[str], Counter[str]]) -> float:
        # The alphabetically first answer wins a tie, so that the figure does not depend on the order of the file.
        guesses = (max(sorted(one), key=one.__getitem__) for one in (counts(item["question"]) for item in test))
        return sum(found == item["answers"][0] for found, item in zip(guesses, test, strict=True)) / len(test)

    return {
        "most_frequent_answer": accuracy(lambda text: overall),
        "most_frequent_answer_per_question": accuracy(lambda text: by_text.get(text, overall)),
    }


def accuracy_by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the accuracy for each kind of question, from the rows that `evaluate` writes."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        answer = row["answers"][0]
        kind = "color" if answer in COLORS else "shape" if answer in SHAPES else "yes or no"
        kinds[kind].append(bool(row["exact_match"]))
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}


def check_bars(
    *, accuracy: float, shapes: float, blind: float, resume: ResumeCheck, exit_code: int, difference: float, smoke: bool
) -> list[dict[str, Any]]:
    """Return the name of each bar, the required value, the value found, and whether the bar is met."""
    compared, different = resume.iterations_compared, len(resume.iterations_different)
    equal, exported = f"{compared - different} of {compared} iterations", difference <= MAX_DIFFERENCE
    bars = [
        ("accuracy on the test split", f">= {MIN_ACCURACY:.2f}", f"{accuracy:.4f}", accuracy >= MIN_ACCURACY),
        ("accuracy of shapes", f">= {MIN_SHAPE_ACCURACY:.2f}", f"{shapes:.4f}", shapes >= MIN_SHAPE_ACCURACY),
        ("accuracy when shown another test picture", f"<= {MAX_BLIND:.2f}", f"{blind:.4f}", blind <= MAX_BLIND),
        ("losses of the resumed run equal the uninterrupted run's", "every bit", equal, resume.bit_equal),
        ("a killed rank ends the whole job with a non-zero exit code", "not 0", str(exit_code), exit_code != 0),
        ("largest difference of logits in transformers", f"<= {MAX_DIFFERENCE:.0e}", f"{difference:.1e}", exported),
    ]
    names = ("name", "required", "found", "met")
    return [dict(zip(names, bar, strict=True)) for bar in (bars[3:] if smoke else bars)]


def summarise(output: Path, *, smoke: bool) -> dict[str, Any]:
    """Return the content of summary.json, from the files that the steps of a quickstart wrote."""
    kill = _read(output / "pretrain_killed.json")
    own, other = _read(output / "evaluate.json"), _read(output / "evaluate_another_picture.json")
    runs = {name: read_run(output / name) for name in (*STAGES, "pretrain_straight")}
    resume = check_resume(runs["pretrain_straight"].metrics, kill["killed"], runs["pretrain"].metrics)
    difference = max((one["max_difference"] for one in _read(output / "logits.json")), default=float("inf"))
    training = read_questions(DOWNLOADS / "easy_vqa-1.0" / "easy_vqa" / "data" / "train")
    by_kind = accuracy_by_kind(own["answers"])
    bars = check_bars(
        accuracy=own["exact_match"],
        shapes=by_kind.get("shape", 0.0),
        blind=other["exact_match"],
        resume=resume,
        exit_code=kill["exit_code"],
        difference=difference,
        smoke=smoke,
    )
    done = sorted((output / "done").iterdir(), key=lambda path: path.stat().st_mtime)
    seconds = {path.name: float(path.read_text()) for path in done}
    return {
        "smoke": smoke,
        "passed": all(bar["met"] for bar in bars),
        "test_accuracy": own["exact_match"],
        "test_questions": len(own["answers"]),
        "test_accuracy_by_kind": by_kind,
        "controls": guess(training, _read(output / "raw" / "test.json")) | {"other_picture": other["exact_match"]},
        "resume_bit_equal": resume.bit_equal,
        "resume": asdict(resume) | {name: kill[name] for name in ("rank", "exit_code", "seconds_to_end")},
        "max_logit_difference": difference,
        "packing_utilisation": {name: 1.0 - runs[name].padding for name in STAGES},
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "requirements": bars,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def describe(summary: dict[str, Any], output: Path) -> str:
    """Return the summary as lines of text."""
    controls = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in summary["controls"].items())
    packing = ", ".join(f"{name} {value:.1%}" for name, value in summary["packing_utilisation"].items())
    lines = [
        f"{'met   ' if bar['met'] else 'MISSED'} {bar['name']}: {bar['found']} (required: {bar['required']})"
        for bar in summary["requirements"]
    ]
    lines += [
        f"test accuracy {summary['test_accuracy']:.4f} on {summary['test_questions']:,} questions",
        f"without looking: {controls}",
        f"positions of the packed rows that hold a token: {packing}",
        f"{summary['seconds_total'] / 60:.1f} minutes in all; {output / 'summary.json'}",
    ]
    return "\n".join([*lines, *(f"report: {(output / name / 'report.html').resolve()}" for name in STAGES)])


def main() -> int:
    """Check, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="skip the bars on accuracy")
    args = parser.parse_args()
    summary = summarise(args.output, smoke=args.smoke)
    (args.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(describe(summary, args.output))
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
