"""The phases of the quickstart, from two downloads to the report."""

import json
import random
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart import controls
from quickstart.assets import EASY_VQA, MISTRAL_COMMON, fetch
from quickstart.corpus import build_corpus
from quickstart.curves import check_resume, read_metrics
from quickstart.findings import Answer, Findings, summarise
from quickstart.machine import describe_machine
from quickstart.phases import PhaseRunner
from quickstart.processes import run_command
from quickstart.report import write_report
from quickstart.scenes import read_questions
from quickstart.size import RunSize
from quickstart.stages import Stage, plan_stage, product_command, train_and_kill, train_stage

DOWNLOADS = Path("runs/quickstart/downloads")
NUM_PHASES = 11
_CONFIGS = Path("examples/quickstart")
_KILLED_RANK = 1
_NUM_SHOWN = 20


@dataclass(slots=True)
class Quickstart:
    """One run of the quickstart.

    Args:
        output: folder of everything it writes.
        size: how large it is.
        smoke: whether it is too short to be held against the bars of accuracy.
        phases: runs them and knows which are done.
    """

    output: Path
    size: RunSize
    smoke: bool
    phases: PhaseRunner

    def run(self) -> Findings:
        """Do all phases that are not done and return what they found."""
        self.download()
        self.build_corpus()
        self.prepare()
        self.train("align", after=["prepare"])
        self.train_straight()
        kill = self.train_and_kill()
        self.train("sft", after=["pretrain"])
        self.convert()
        logits = self.compare_logits()
        own = self.evaluate("evaluate")
        other = self.evaluate("evaluate another picture", "--swap-images", "0")
        return self._collect(kill=kill, logits=logits, own=own, other=other)

    def download(self) -> None:
        """Fetch pictures, questions and tokenizer."""

        def action() -> dict[str, Any]:
            fetch(EASY_VQA, DOWNLOADS)
            source = fetch(MISTRAL_COMMON, DOWNLOADS) / "mistral_common" / "data" / "tokenizer.model.v1"
            shutil.copyfile(source, self.tokenizer)
            return {}

        inputs = [EASY_VQA.sha256, MISTRAL_COMMON.sha256]
        self.phases.run("download", action, inputs=inputs, outputs=[self.tokenizer, self._package()])

    def build_corpus(self) -> None:
        """Write the raw corpora and the test questions."""

        def action() -> dict[str, Any]:
            shutil.rmtree(self.raw, ignore_errors=True)
            return build_corpus(self._package(), self.raw, self.size.corpus)

        code = [Path(__file__).with_name(name) for name in ("corpus.py", "scenes.py", "pictures.py")]
        self.phases.run(
            "corpus", action, inputs=[repr(self.size.corpus), *code], after=["download"], outputs=[self.raw]
        )

    def prepare(self) -> None:
        """Turn the raw corpora into shards and check them."""

        def action() -> dict[str, Any]:
            for arguments in self.prepare_arguments():
                self._product(arguments, "prepare")
            for name in ("coyo", "mmc4", "llava"):
                self._product(["data", "verify", str(self.data / name)], "prepare")
            return {}

        inputs = [self.prepare_arguments()]
        self.phases.run("prepare", action, inputs=inputs, after=["corpus"], outputs=[self.data])

    def prepare_arguments(self) -> list[list[str]]:
        """Return what follows `megatron-vlm` for each corpus."""
        llava, mmc4 = self.raw / "llava", self.raw / "mmc4"
        commands: dict[str, list[Any]] = {
            "coyo": ["pairs", "--input", self.raw / "coyo"],
            "mmc4": ["interleaved", "--input", mmc4, "--images", mmc4 / "images"],
            # A small model has better use for its tokens than the same system prompt in every conversation.
            "llava": ["conversations", "--input", llava / "instructions.json", "--images", llava, "--system", "none"],
        }
        return [
            ["prepare", *map(str, command), "--output", str(self.data / name), "--tokenizer", str(self.tokenizer)]
            for name, command in commands.items()
        ]

    def train(self, name: str, after: Sequence[str]) -> None:
        """Run a stage."""
        stage = self._stage(name)
        self.phases.run(
            name,
            lambda: train_stage(stage, self._log(name)),
            inputs=self._stage_inputs(stage),
            after=after,
            outputs=[Path(stage.load().run_dir)],
        )

    def straight_stage(self) -> Stage:
        """Return the beginning of pretrain as a run of its own, which nothing interrupts."""
        return self._stage(
            "pretrain",
            f"run_dir={self.output}/pretrain_straight",
            f"training.exit_iteration={self.size.straight_iterations}",
        )

    def train_straight(self) -> None:
        """Run the beginning of pretrain without interruption."""
        stage = self.straight_stage()
        self.phases.run(
            "pretrain, uninterrupted",
            lambda: train_stage(stage, self._log("pretrain_straight")),
            inputs=self._stage_inputs(stage),
            after=["align"],
            outputs=[Path(stage.load().run_dir)],
        )

    def train_and_kill(self) -> dict[str, Any]:
        """Run pretrain, kill a rank in the middle of it and run it again."""
        stage = self._stage("pretrain")
        run_dir = Path(stage.load().run_dir)
        return self.phases.run(
            "pretrain",
            lambda: train_and_kill(stage, self._log("pretrain"), kill_after=self.size.kill_after, rank=_KILLED_RANK),
            inputs=[*self._stage_inputs(stage), self.size.kill_after, _KILLED_RANK],
            after=["align"],
            outputs=[run_dir, run_dir.with_name(run_dir.name + "_kill.json")],
        )

    def convert(self) -> None:
        """Export the last checkpoint to Hugging Face."""
        arguments = self.convert_arguments()
        self.phases.run(
            "convert",
            lambda: self._product(arguments, "convert"),
            inputs=[arguments],
            after=["sft"],
            outputs=[self.exported],
        )

    def convert_arguments(self) -> list[str]:
        """Return what follows `megatron-vlm`."""
        return ["convert", "to-hf", self.sft, "--format", "llava", "--output", str(self.exported)]

    def compare_logits(self) -> list[dict[str, Any]]:
        """Compare our logits with those of the exported folder in transformers."""
        written, result = self.output / "logits.npz", self.output / "logits.json"
        module = [sys.executable, "-m", "quickstart.logits"]

        def action() -> dict[str, Any]:
            run_command([*module, "write", self.sft, str(self.raw / "test.json"), str(written)], self._log("logits"))
            run_command([*module, "compare", str(self.exported), str(written), str(result)], self._log("logits"))
            written.unlink()
            return {"samples": json.loads(result.read_text())}

        code = Path(__file__).with_name("logits.py")
        return self.phases.run("logits", action, inputs=[code], after=["convert"], outputs=[result])["samples"]

    def evaluate(self, name: str, *options: str) -> dict[str, Any]:
        """Answer the test questions with the last checkpoint."""
        arguments = self.evaluate_arguments(name, *options)
        result = Path(arguments[arguments.index("--output") + 1])
        self.phases.run(
            name,
            lambda: self._product(arguments, result.stem),
            inputs=[arguments],
            after=["sft", "corpus"],
            outputs=[result],
        )
        return json.loads(result.read_text())

    def evaluate_arguments(self, name: str, *options: str) -> list[str]:
        """Return what follows `megatron-vlm`."""
        output = self.output / f"{name.replace(' ', '_')}.json"
        arguments = ["evaluate", self.sft, "--task", "vqa", "--questions", str(self.raw / "test.json")]
        return [*arguments, "--system", "none", "--max-new-tokens", "4", "--output", str(output), *options]

    @property
    def raw(self) -> Path:
        """Raw corpora."""
        return self.output / "raw"

    @property
    def data(self) -> Path:
        """Prepared shards."""
        return self.output / "data"

    @property
    def tokenizer(self) -> Path:
        """SentencePiece model."""
        return self.output / "tokenizer.model"

    @property
    def sft(self) -> str:
        """Run folder of the last stage."""
        return str(self.output / "sft")

    @property
    def exported(self) -> Path:
        """Hugging Face folder."""
        return self.output / "huggingface"

    def _package(self) -> Path:
        return DOWNLOADS / f"{EASY_VQA.name}-{EASY_VQA.version}"

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    def _product(self, arguments: Sequence[str], log: str) -> dict[str, Any]:
        run_command(product_command(arguments), self._log(log))
        return {}

    def _stage(self, name: str, *overrides: str) -> Stage:
        return plan_stage(name, self.output, (*self.size.stage_overrides.get(name, ()), *overrides))

    def _stage_inputs(self, stage: Stage) -> list[Any]:
        return [_CONFIGS / "base.yaml", stage.config, stage.arguments]

    def _collect(
        self, *, kill: dict[str, Any], logits: list[dict[str, Any]], own: dict[str, Any], other: dict[str, Any]
    ) -> Findings:
        items = json.loads((self.raw / "test.json").read_text())
        training = read_questions(self._package() / "easy_vqa" / "data" / "train" / "questions.json")
        pretrain = read_metrics(self.output / "pretrain")
        straight = read_metrics(self.output / "pretrain_straight")
        return Findings(
            smoke=self.smoke,
            stages={name: read_metrics(self.output / name) for name in ("align", "pretrain", "sft")},
            straight=straight,
            killed=kill["killed"],
            resume=check_resume(straight, kill["killed"], pretrain),
            kill={name: kill[name] for name in ("rank", "exit_code", "seconds_to_end")},
            accuracy=own["exact_match"],
            num_questions=len(items),
            accuracy_by_kind=controls.count_by_kind(own["answers"]),
            controls={
                "most_frequent_answer": controls.most_frequent_answer(training, items),
                "most_frequent_answer_per_question": controls.most_frequent_answer_per_question(training, items),
                "other_picture": other["exact_match"],
            },
            answers=_show_answers(own["answers"]),
            logits=logits,
            seconds={name: seconds for name, seconds in self.phases.seconds.items() if name != "download"},
            facts=describe_machine(self._stage("sft").load()),
            commands=self._commands(),
        )

    def _commands(self) -> list[tuple[str, str]]:
        named = [("prepare", arguments) for arguments in self.prepare_arguments()]
        named += [("align", self._stage("align").arguments), ("pretrain", self._stage("pretrain").arguments)]
        named += [("pretrain, uninterrupted", self.straight_stage().arguments)]
        named += [("sft", self._stage("sft").arguments), ("convert", self.convert_arguments())]
        named += [("evaluate", self.evaluate_arguments("evaluate"))]
        return [(name, " ".join(["megatron-vlm", *map(shlex.quote, arguments)])) for name, arguments in named]


def write_results(findings: Findings, output: Path) -> dict[str, Any]:
    """Write summary.json and report.html and return the summary."""
    summary = summarise(findings)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(findings, output / "report.html")
    return summary


def _show_answers(rows: Sequence[dict[str, Any]]) -> list[Answer]:
    """Return a fixed draw of test questions, each about another picture."""
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    chosen: dict[str, dict[str, Any]] = {}
    for row in shuffled:
        chosen.setdefault(row["images"][0], row)
    return [
        Answer(
            picture=Path(image).read_bytes(),
            question=row["question"],
            expected=row["answers"][0],
            predicted=row["prediction"],
        )
        for image, row in list(chosen.items())[:_NUM_SHOWN]
    ]
