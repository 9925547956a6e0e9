"""The report: one HTML file that needs nothing beside itself."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from quickstart.charts import Band, Bar, BarChart, LineChart, Marker, Series, draw_bars, draw_lines
from quickstart.curves import Record, measure_throughput, select_resumed, source_names
from quickstart.findings import MAX_BLIND_ACCURACY, MIN_ACCURACY, Findings, check_requirements

_STYLE = Path(__file__).with_name("report.css")
_STAGE_COLORS = {"align": 0, "pretrain": 1, "sft": 2}
_SOURCE_LABELS = {"coyo": "pairs (coyo)", "mmc4": "interleaved (mmc4)", "llava": "conversations (llava)"}
_LEAD = (
    "A small vision-language model, trained from random weights on real pictures and questions (easy-vqa, training "
    "split only) by the same commands that a cluster runs: prepare, three stages on several processes (packed rows, "
    "the model split over the processes), one <code>kill&nbsp;-9</code> in the middle, export to Hugging Face, "
    "evaluation on the test split."
)


def write_report(findings: Findings, path: Path) -> None:
    """Write the report to `path`; no script, no file and no address beside it is needed to read it."""
    sections = [
        _header(findings),
        _tiles(findings),
        _requirements(findings),
        _accuracy(findings),
        _answers(findings),
        _losses(findings),
        _resume(findings),
        _packing(findings),
        _throughput(findings),
        _export(findings),
        _seconds(findings),
        _commands(findings),
        _facts(findings.facts),
    ]
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>megatron_vlm quickstart</title><style>\n{_STYLE.read_text()}</style></head>\n"
        f"<body><main>\n{chr(10).join(sections)}\n</main></body></html>\n",
        encoding="utf-8",
    )


def _header(findings: Findings) -> str:
    missed = sum(not one.met for one in check_requirements(findings))
    text = f"{missed} bar{'s' if missed > 1 else ''} missed"
    pill = _pill(text, met=False) if missed else _pill("all bars met", met=True)
    smoke = '<span class="pill">smoke run: too short to be accurate</span>' if findings.smoke else ""
    return f'<header><h1>megatron_vlm quickstart</h1>{pill}{smoke}</header><p class="lead">{_LEAD}</p>'


def _tiles(findings: Findings) -> str:
    resume = findings.resume
    iterations = sum(len(records) for records in findings.stages.values())
    tokens = sum(record["tokens"] for records in findings.stages.values() for record in records)
    every = [record for records in findings.stages.values() for record in records]
    packed = findings.packing_utilisation
    tiles = [
        ("Test accuracy", f"{findings.accuracy:.1%}", f"of {findings.num_questions:,} questions on unseen pictures"),
        (
            "Another picture",
            f"{findings.controls['other_picture']:.1%}",
            "the same model and questions, shown a different test picture",
        ),
        (
            "Kill and resume",
            "bit-equal" if resume.bit_equal else "differs",
            f"{len(resume.compared)} iterations compared with a straight run",
        ),
        ("Export", f"{findings.max_logit_difference:.0e}", "largest logit difference to transformers"),
        ("Packing", f"{min(packed.values(), default=0):.1%}", "of the positions hold a token, in the worst stage"),
        ("Training", f"{measure_throughput(every):,.0f}", f"tokens/s; {tokens / 1e6:.1f} M in {iterations:,} steps"),
    ]
    cells = "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><span>{note}</span></div>' for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _requirements(findings: Findings) -> str:
    rows = [
        [html.escape(one.name), html.escape(one.required), html.escape(one.found), _pill_of(one.met)]
        for one in check_requirements(findings)
    ]
    return _card("The bars", "", _table(["what", "required", "found", ""], rows))


def _accuracy(findings: Findings) -> str:
    controls = findings.controls
    bars = [
        Bar(name="this model", value=findings.accuracy, text=f"{findings.accuracy:.1%}", color=0, note="test split"),
        _control("same model, another picture", controls["other_picture"], "what it knows without looking"),
        _control(
            "most frequent answer per question",
            controls["most_frequent_answer_per_question"],
            "counted on the training split",
        ),
        _control("most frequent answer", controls["most_frequent_answer"], "counted on the training split"),
    ]
    marks = [] if findings.smoke else [Marker(x=MIN_ACCURACY, label=f"required {MIN_ACCURACY:.0%}")]
    kinds = [
        Bar(
            name=kind,
            value=right / total if total else 0.0,
            text=f"{right / total if total else 0:.1%}",
            color=0,
            note=f"{right:,} of {total:,}",
        )
        for kind, (right, total) in findings.accuracy_by_kind.items()
    ]
    text = (
        "Exact match of the greedy answer with the published one. A model that does not look can still guess from the "
        f"wording; the second bar shows how far that goes (it must stay at or below {MAX_BLIND_ACCURACY:.0%})."
    )
    return _card(
        "Accuracy beside what guessing reaches",
        text,
        draw_bars(BarChart(title="Accuracy and controls", bars=bars, limit=1.0, markers=marks)),
        "<h2>By kind of question</h2>",
        draw_bars(BarChart(title="Accuracy by kind of question", bars=kinds, limit=1.0)),
    )


def _control(name: str, value: float, note: str) -> Bar:
    return Bar(name=name, value=value, text=f"{value:.1%}", color=4, note=note)


def _answers(findings: Findings) -> str:
    cards = []
    for answer in findings.answers:
        picture = base64.b64encode(answer.picture).decode()
        expected = "" if answer.correct else f'<span class="expected">not {html.escape(answer.expected)}</span>'
        cards.append(
            f'<div class="answer"><img alt="test picture" src="data:image/png;base64,{picture}"><div>'
            f'<span class="question">{html.escape(answer.question)}</span>'
            f"{_pill(answer.predicted or '(nothing)', met=answer.correct)}{expected}</div></div>"
        )
    right = sum(answer.correct for answer in findings.answers)
    text = f"A fixed draw from the test split, not a selection: {right} of these {len(findings.answers)} are right."
    return _card("Test pictures, questions and answers", text, f'<div class="answers">{"".join(cards)}</div>')


def _losses(findings: Findings) -> str:
    series, bands, start = [], [], 0
    names = list(dict.fromkeys(name for records in findings.stages.values() for name in source_names(records)))
    for stage, records in findings.stages.items():
        for name in source_names(records):
            kept = [record for record in records if f"loss/{name}" in record]
            series.append(
                Series(
                    name=_SOURCE_LABELS.get(name, name),
                    xs=[start + record["iteration"] for record in kept],
                    ys=[record[f"loss/{name}"] for record in kept],
                    color=names.index(name) % 5,
                )
            )
        stop = start + max((record["iteration"] for record in records), default=0)
        bands.append(Band(start=start, stop=stop, name=stage))
        start = stop
    chart = LineChart(
        title="Loss per source and stage",
        series=series,
        bands=bands,
        x_label="iteration, all stages one after the other",
        y_label="loss per token (log scale)",
        y_log=True,
        height=340,
    )
    text = "Mean over the trained tokens of each dataset. Faint: every few iterations; strong: mean of neighbours."
    return _card("Loss per source and stage", text, draw_lines(chart))


def _resume(findings: Findings) -> str:
    resume, kill = findings.resume, findings.kill
    first = max(1, resume.resumed_from - 15)
    last = resume.compared[-1] if resume.compared else resume.killed_after + 15
    resumed = select_resumed(findings.killed, findings.stages.get("pretrain", []))
    series = [
        _loss_series("uninterrupted run", findings.straight, first, last, color=4),
        _loss_series("until the kill", findings.killed, first, last, color=1, dashed=True),
        _loss_series("after resuming", resumed, first, last, color=0, dashed=True),
    ]
    chart = LineChart(
        title="Loss around the kill",
        series=series,
        markers=[
            Marker(x=resume.resumed_from, label="checkpoint"),
            Marker(x=resume.killed_after, label=f"kill -9 of rank {kill['rank']}"),
        ],
        x_label="iteration of pretrain",
        y_label="loss per token",
    )
    text = (
        f"Rank {kill['rank']} was killed with signal 9 after iteration {resume.killed_after}; the job ended "
        f"{kill['seconds_to_end']:.1f} s later with exit code {kill['exit_code']}. The same command, given again, took "
        f"up the checkpoint of iteration {resume.resumed_from}. Of the {len(resume.compared)} iterations that an "
        f"uninterrupted run also made, {len(resume.compared) - len(resume.different)} have the same loss and gradient "
        "norm in every bit."
    )
    return _card("Kill and resume", text, draw_lines(chart), _loss_table(findings))


def _loss_series(
    name: str, records: Sequence[Record], first: int, last: int, *, color: int, dashed: bool = False
) -> Series:
    kept = [record for record in records if first <= record["iteration"] <= last]
    return Series(
        name=name,
        xs=[record["iteration"] for record in kept],
        ys=[record["loss"] for record in kept],
        color=color,
        dashed=dashed,
        smooth=False,
    )


def _loss_table(findings: Findings) -> str:
    resume = findings.resume
    killed = {record["iteration"]: record["loss_hex"] for record in findings.killed}
    resumed = select_resumed(findings.killed, findings.stages.get("pretrain", []))
    final = {record["iteration"]: record["loss_hex"] for record in resumed}
    shown = [
        record
        for record in findings.straight
        if resume.killed_after - 3 < record["iteration"] <= resume.killed_after + 3
    ]
    rows = []
    for record in shown:
        iteration, expected = record["iteration"], record["loss_hex"]
        before, after = killed.get(iteration), final.get(iteration)
        equal = all(found == expected for found in (before, after) if found is not None)
        losses = [f"<code>{value or ''}</code>" for value in (expected, before, after)]
        rows.append([f"{iteration:,}", *losses, _pill("equal" if equal else "differs", met=equal)])
    return _table(["iteration", "uninterrupted", "until the kill", "after resuming", ""], rows)


def _packing(findings: Findings) -> str:
    bars = [
        Bar(name=stage, value=value, text=f"{value:.1%}", color=_STAGE_COLORS.get(stage, 3))
        for stage, value in findings.packing_utilisation.items()
    ]
    text = (
        "Several samples share a row of fixed length, each with its own positions and attention. The share of "
        "positions that hold a token; the rest is padding."
    )
    chart = BarChart(title="Packing utilisation", bars=bars, limit=1.0)
    return _card("Packing utilisation", text, draw_bars(chart))


def _throughput(findings: Findings) -> str:
    series, bands, start = [], [], 0
    for stage, records in findings.stages.items():
        series.append(
            Series(
                name=stage,
                xs=[start + record["iteration"] for record in records],
                ys=[record["tokens_per_s"] for record in records],
                color=_STAGE_COLORS.get(stage, 3),
            )
        )
        stop = start + max((record["iteration"] for record in records), default=0)
        bands.append(Band(start=start, stop=stop, name=stage))
        start = stop
    chart = LineChart(
        title="Throughput",
        series=series,
        bands=bands,
        x_label="iteration, all stages one after the other",
        y_label="tokens a second",
        y_from_zero=True,
        height=240,
    )
    return _card("Throughput", "Tokens a second of all processes together; padding is not counted.", draw_lines(chart))


def _export(findings: Findings) -> str:
    rows = [
        [str(number), str(sample["num_images"]), str(sample["num_tokens"]), f"{sample['max_difference']:.2e}"]
        for number, sample in enumerate(findings.logits, start=1)
    ]
    text = (
        "The sharded checkpoint, exported with <code>convert to-hf --format llava</code> and loaded by "
        "<code>LlavaForConditionalGeneration.from_pretrained</code> in a process of its own, in fp32, beside our own "
        "model on test pictures."
    )
    table = _table(["sample", "pictures", "tokens", "max |logit difference|"], rows)
    return _card("Export to Hugging Face", text, table)


def _seconds(findings: Findings) -> str:
    longest = max(findings.seconds.values(), default=1.0)
    bars = [
        Bar(name=phase, value=seconds, text=f"{seconds:.0f} s", color=_phase_color(phase))
        for phase, seconds in findings.seconds.items()
    ]
    total = sum(findings.seconds.values())
    text = f"{total / 60:.1f} minutes in all, installation and download not counted."
    return _card("Time per phase", text, draw_bars(BarChart(title="Time per phase", bars=bars, limit=longest)))


def _phase_color(phase: str) -> int:
    return next((color for stage, color in _STAGE_COLORS.items() if phase.startswith(stage)), 4)


def _commands(findings: Findings) -> str:
    rows = [[html.escape(phase), f"<pre>{html.escape(command)}</pre>"] for phase, command in findings.commands]
    return _card("The commands", "What ran, to copy; a cluster uses the same ones.", _table(["phase", "command"], rows))


def _facts(facts: Mapping[str, str]) -> str:
    rows = [[html.escape(name), html.escape(value)] for name, value in facts.items()]
    return _card("Where and with what", "", _table(["", ""], rows))


def _card(title: str, text: str, *parts: str) -> str:
    paragraph = f"<p>{text}</p>" if text else ""
    return f'<section class="card"><h2>{title}</h2>{paragraph}{"".join(parts)}</section>'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>" if any(names) else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def _pill(text: str, *, met: bool) -> str:
    return f'<span class="pill {"met" if met else "missed"}">{html.escape(text)}</span>'


def _pill_of(met: bool) -> str:
    return _pill("met" if met else "missed", met=met)
