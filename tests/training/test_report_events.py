import pytest

from megatron_vlm.platform.files.events import Event
from megatron_vlm.training.report_events import event_marks, events_card
from megatron_vlm.training.run_records import RunRecords


def event(kind, iteration, **details):
    return Event(kind=kind, unix_time=1e9 + (iteration or 0), what=f"<{kind}>", iteration=iteration, details=details)


def run_of(events, unreadable_lines=0):
    return RunRecords(
        run_dir="run",
        metrics=[],
        unreadable_lines=unreadable_lines,
        config_text="",
        events=events,
        time_spent=None,
        end=None,
    )


@pytest.mark.parametrize(
    ("kind", "details", "name"),
    [
        ("save", {"seconds": 1.0}, "save"),
        ("failed_save", {}, "failed save"),
        ("end", {"exit_code": 1}, "fault"),
        ("end", {"exit_code": 71}, "fault"),
        ("begin", {}, "resume"),
        ("blend", {}, "blend change"),
        ("spike", {}, "spike"),
        ("damaged_checkpoint", {"checkpoint": "iter_0000009"}, "damaged checkpoint"),
        ("kind_of_its_own", {}, "other"),
    ],
)
def test_events_are_marks_by_what_they_mean(kind, details, name):
    (mark,) = event_marks([event(kind, 4, **details), event(kind, 9, **details), event(kind, None, **details)])
    assert (mark.name, list(mark.xs)) == (name, [4, 9])


@pytest.mark.parametrize(
    "one",
    [
        event("start", 0),
        event("begin", 0),
        event("validation", 4),
        *(event("end", 4, exit_code=code) for code in (0, 75, 130)),
    ],
    ids=lambda one: f"{one.kind} {dict(one.details)}",
)
def test_what_is_usual_is_no_mark(one):
    assert event_marks([one]) == []


def test_table_has_every_event_and_what_the_steps_waited():
    page = events_card(run_of([event("start", None), event("save", 4000, seconds=2.5)]))
    row = "<td>2001-09-09 02:53:20</td><td>4,000</td><td>save</td><td>&lt;save&gt;</td><td>2.5 s</td>"
    assert row in page
    assert "<td>-</td><td>start</td><td>&lt;start&gt;</td><td></td>" in page


def test_table_leaves_out_the_middle_of_what_is_frequent():
    page = events_card(run_of([event("save", n) for n in range(1, 101)] + [event("spike", 50)]))
    listed = [n for n in range(1, 101) if f"<td>{n}</td><td>save</td>" in page]
    assert listed == [*range(1, 26), *range(76, 101)]
    assert "<td>50</td><td>spike</td>" in page
    assert "events.jsonl has all 101" in page


def test_unreadable_lines_are_told():
    assert "3 unreadable lines" in events_card(run_of([], unreadable_lines=3))
