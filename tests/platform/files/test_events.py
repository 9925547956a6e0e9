import json

import pytest

from megatron_vlm.platform.files.events import SAVE, Event, read_events, record_event
from megatron_vlm.platform.files.run_folder import EVENTS_NAME


def test_an_event_is_a_line_that_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.5)
    record_event(tmp_path, SAVE, "saved iter_0000004", iteration=4, seconds=2.5)
    record_event(tmp_path, "own_kind", "something else")
    assert json.loads((tmp_path / EVENTS_NAME).read_text().splitlines()[0]) == {
        "kind": "save",
        "unix_time": 1000.5,
        "iteration": 4,
        "what": "saved iter_0000004",
        "seconds": 2.5,
    }
    events, damaged = read_events(tmp_path)
    assert events == [
        Event(kind="save", unix_time=1000.5, iteration=4, what="saved iter_0000004", details={"seconds": 2.5}),
        Event(kind="own_kind", unix_time=1000.5, what="something else"),
    ]
    assert [event.seconds() for event in events] == [2.5, 0.0]
    assert damaged == 0


def test_a_line_that_a_kill_cut_short_is_counted_and_harms_no_other(tmp_path):
    record_event(tmp_path, SAVE, "first")
    with (tmp_path / EVENTS_NAME).open("a") as stream:
        stream.write('{"kind": "save", "unix_t')
    record_event(tmp_path, SAVE, "second")
    events, damaged = read_events(tmp_path)
    assert [event.what for event in events] == ["first", "second"]
    assert damaged == 1


OWN = {"kind": "save", "unix_time": 1.0, "iteration": None, "what": "x"}
DAMAGED = [
    b"[]",
    b"null",
    b"\xff\xfe\x80{",
    b"\0" * 64,
    b"[" * 100_000,
    *(json.dumps({**OWN, name: value}).encode() for name in OWN for value in ({}, [], True)),
    *(json.dumps({**OWN, "unix_time": value}).encode() for value in (1e300, -1e300, float("nan"), 10**400)),
    *(json.dumps({key: value for key, value in OWN.items() if key != name}).encode() for name in OWN),
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_what_is_no_event_is_counted(tmp_path, line):
    (tmp_path / EVENTS_NAME).write_bytes(line + b"\n" + json.dumps(OWN).encode() + b"\n")
    assert ([event.what for event in read_events(tmp_path)[0]], read_events(tmp_path)[1]) == (["x"], 1)


def test_run_without_the_file_has_no_events(tmp_path):
    assert read_events(tmp_path) == ([], 0)


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    record_event(tmp_path / "missing", SAVE, "saved iter_0000004")
    assert "an event could not be recorded" in caplog.text
    assert "No such file or directory (saved iter_0000004)" in caplog.text
