"""What a quickstart run found out, and the bars it is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quickstart.curves import Record, ResumeCheck, measure_packing

MIN_ACCURACY = 0.80
MAX_BLIND_ACCURACY = 0.72
MAX_LOGIT_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The model's answer to one test question."""

    picture: bytes
    """PNG file."""
    question: str
    expected: str
    predicted: str

    @property
    def correct(self) -> bool:
        """Whether the answer is the expected one."""
        return self.predicted == self.expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One bar."""

    name: str
    required: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that the summary and the report are made of."""

    smoke: bool
    """A short run: accuracy is measured but not held against a bar."""
    stages: Mapping[str, Sequence[Record]]
    """Records of metrics.jsonl by stage, in order."""
    straight: Sequence[Record]
    """Records of the uninterrupted run of the first part of pretrain."""
    killed: Sequence[Record]
    """Records that pretrain had written when a rank of it was killed."""
    resume: ResumeCheck
    kill: Mapping[str, Any]
    """Which rank died, what the launcher returned and how long it took."""
    accuracy: float
    num_questions: int
    accuracy_by_kind: Mapping[str, tuple[int, int]]
    """Right answers and questions by kind of question."""
    controls: Mapping[str, float]
    """Accuracy of most_frequent_answer, most_frequent_answer_per_question and other_picture."""
    answers: Sequence[Answer]
    logits: Sequence[Mapping[str, Any]]
    """Per sample: number of images, tokens and max_difference."""
    seconds: Mapping[str, float]
    """By phase, in order."""
    facts: Mapping[str, str]
    """Machine, versions and sizes for the foot of the report."""
    commands: Sequence[tuple[str, str]]
    """Phase and the command that a user would type for it."""

    @property
    def max_logit_difference(self) -> float:
        """Largest difference over all samples and positions."""
        return max((float(sample["max_difference"]) for sample in self.logits), default=float("inf"))

    @property
    def packing_utilisation(self) -> dict[str, float]:
        """Share of positions that held a token, by stage."""
        return {stage: measure_packing(records) for stage, records in self.stages.items()}


def check_requirements(findings: Findings) -> list[Requirement]:
    """Return every bar with what was found; a smoke run is not held against the two of accuracy."""
    resume, difference = findings.resume, findings.max_logit_difference
    requirements = [
        Requirement(
            name="losses of the resumed run equal the uninterrupted run's",
            required="every bit",
            found=f"{len(resume.compared) - len(resume.different)} of {len(resume.compared)} iterations",
            met=resume.bit_equal,
        ),
        Requirement(
            name="a killed rank ends the whole job with a non-zero exit code",
            required="not 0",
            found=str(findings.kill["exit_code"]),
            met=findings.kill["exit_code"] != 0,
        ),
        Requirement(
            name="logits of the exported model equal our own (transformers, fp32)",
            required=f"max |difference| <= {MAX_LOGIT_DIFFERENCE:.0e}",
            found=f"{difference:.1e}",
            met=difference <= MAX_LOGIT_DIFFERENCE,
        ),
    ]
    if findings.smoke:
        return requirements
    blind = findings.controls["other_picture"]
    return [
        Requirement(
            name="accuracy on the test split",
            required=f">= {MIN_ACCURACY:.2f}",
            found=f"{findings.accuracy:.4f}",
            met=findings.accuracy >= MIN_ACCURACY,
        ),
        Requirement(
            name="accuracy when shown another test picture",
            required=f"<= {MAX_BLIND_ACCURACY:.2f}",
            found=f"{blind:.4f}",
            met=blind <= MAX_BLIND_ACCURACY,
        ),
        *requirements,
    ]


def summarise(findings: Findings) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "smoke": findings.smoke,
        "passed": all(requirement.met for requirement in check_requirements(findings)),
        "test_accuracy": findings.accuracy,
        "test_questions": findings.num_questions,
        "test_accuracy_by_kind": {
            kind: right / total for kind, (right, total) in findings.accuracy_by_kind.items() if total
        },
        "controls": dict(findings.controls),
        "resume_bit_equal": findings.resume.bit_equal,
        "resume": {
            "killed_after": findings.resume.killed_after,
            "resumed_from": findings.resume.resumed_from,
            "iterations_compared": len(findings.resume.compared),
            "iterations_different": list(findings.resume.different),
            **findings.kill,
        },
        "max_logit_difference": findings.max_logit_difference,
        "packing_utilisation": findings.packing_utilisation,
        "seconds": dict(findings.seconds),
        "seconds_total": sum(findings.seconds.values()),
        "requirements": [
            {"name": one.name, "required": one.required, "found": one.found, "met": one.met}
            for one in check_requirements(findings)
        ],
    }
