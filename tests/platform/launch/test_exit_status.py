import errno
import json

import pytest

from megatron_vlm.config import ConfigError, DataError, ExitCode, NumericError, UserError
from megatron_vlm.platform.launch.exit_status import (
    MAX_LINE,
    ExitStatus,
    describe_error,
    error_line,
    forget_exit_status,
    read_exit_status,
    record_exit_status,
    write_exit_status,
)


def status(code, launch_id="a", message=""):
    return ExitStatus(exit_code=code, message=message, launch_id=launch_id)


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 78), (DataError, 65), (NumericError, 70), (UserError, 64)])
def test_user_error_keeps_its_exit_code_and_has_no_traceback(kind, code):
    described = describe_error(kind("what", where="here", fix="that"))
    assert (described.exit_code, described.message, described.traceback) == (code, "what (here); fix: that", None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_error_of_the_disk_is_storage_and_names_the_file(number):
    described = describe_error(OSError(number, "text of the system", "/data/00000.bin"))
    assert described.exit_code == ExitCode.STORAGE
    assert "text of the system (/data/00000.bin); fix:" in described.message


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR])
def test_a_folder_in_place_of_a_file_is_named_with_what_to_do(number):
    described = describe_error(OSError(number, "text of the system", "run/events.jsonl"))
    assert described.exit_code == ExitCode.STORAGE
    assert described.message == "text of the system (run/events.jsonl); fix: move away what stands there"


def test_error_of_the_system_that_names_no_file_names_the_run():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert "No space left on device (runs/a); fix: " in describe_error(error, "runs/a").message
    assert "No space left on device; fix: " in describe_error(error).message


def test_other_os_error_is_a_crash():
    assert describe_error(FileNotFoundError(errno.ENOENT, "no such file", "x")).exit_code == ExitCode.CRASH


def test_unforeseen_error_keeps_its_traceback_and_one_line():
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        described = describe_error(error)
    assert (described.exit_code, described.message) == (ExitCode.CRASH, "ValueError: first line")
    assert "test_exit_status.py" in described.traceback


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete",
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600001 ms",
        "wait timeout after 600000ms, keys: /default_pg/0//main_rank_first/1",
        "Timed out after 61 seconds waiting for clients. 1/2 clients joined.",
        "The client socket has timed out after 600000ms while trying to connect to (node1, 15007).",
    ],
)
def test_collective_that_takes_too_long_has_an_exit_code_of_its_own(text):
    described = describe_error(RuntimeError(text))
    assert (described.exit_code, described.traceback) == (ExitCode.TIMEOUT, None)
    assert described.message == f"timed out: {text}"
    assert describe_error(RuntimeError("Connection closed by peer")).exit_code == ExitCode.CRASH


def test_what_follows_from_the_loss_of_another_rank_is_a_symptom():
    for text in ("[../gloo/transport/tcp/pair.cc:541] Connection closed by peer", "NCCL error: remote process exited"):
        assert describe_error(RuntimeError(text)).is_symptom
    kind = type("DistNetworkError", (type("DistError", (RuntimeError,), {}),), {})  # as torch's
    assert describe_error(kind("failed to recv, got 0 bytes")).is_symptom
    assert not describe_error(RuntimeError("shapes do not match")).is_symptom
    assert not describe_error(KeyError("Connection closed by peer")).is_symptom


def test_interrupt_is_quiet():
    assert describe_error(KeyboardInterrupt()).exit_code == ExitCode.INTERRUPTED


def test_long_line_is_cut_in_what_was_found_and_keeps_place_and_fix():
    described = describe_error(ConfigError("x" * 500, where="train.yaml:12", fix="choose 16"))
    line = error_line(described.message)
    assert len(line) <= MAX_LINE
    assert line.endswith("... (train.yaml:12); fix: choose 16")


def test_long_path_keeps_its_ends_and_the_fix():
    described = describe_error(
        ConfigError("file is empty", where=f"/data/{'x' * 400}/train.yaml:3", fix="copy it again")
    )
    line = error_line(described.message)
    assert len(line) <= MAX_LINE
    assert line.startswith("megatron-vlm: error: file is empty (/data/xx")
    assert line.endswith("xx/train.yaml:3); fix: copy it again")


def test_line_is_never_longer_than_the_limit():
    described = describe_error(ConfigError("w" * 400, where="f" * 400, fix="d" * 400))
    assert len(error_line(described.message)) <= MAX_LINE


def test_status_that_was_written_is_read_back(tmp_path):
    written = ExitStatus(exit_code=65, message="bad shard", rank=3, iteration=17, launch_id="slurm-1-0-0")
    write_exit_status(tmp_path / "exit_status.json", written)
    assert read_exit_status(tmp_path / "exit_status.json") == written


def test_job_script_finds_exit_code_message_and_iteration(tmp_path):
    write_exit_status(tmp_path / "s.json", ExitStatus(exit_code=75, message="stopped", iteration=8))
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["exit_code"], found["message"], found["iteration"]) == (75, "stopped", 8)


def test_writing_leaves_no_other_file(tmp_path):
    write_exit_status(tmp_path / "s.json", status(0))
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    "content", [b"", b'{"exit_code": 65, "mess', b'{"other": 1}', b"\xff\xfe", b"[]", b"[" * 100_000]
)
def test_half_written_or_damaged_file_counts_as_none(tmp_path, content):
    (tmp_path / "s.json").write_bytes(content)
    assert read_exit_status(tmp_path / "s.json") is None


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (0, 1, 1),
        (75, 1, 1),
        (1, 65, 65),
        (65, 1, 65),
        (65, 70, 65),
        (1, 75, 1),
        (75, 0, 75),
        (1, 0, 1),
        (1, 71, 1),
        (71, 65, 65),
    ],
)
def test_status_that_explains_more_is_kept_among_nodes_of_a_launch(tmp_path, first, second, kept):
    for code in (first, second):
        record_exit_status(tmp_path / "s.json", status(code))
    assert read_exit_status(tmp_path / "s.json").exit_code == kept


def test_status_of_an_earlier_launch_is_replaced(tmp_path):
    record_exit_status(tmp_path / "s.json", status(65, launch_id="a"))
    record_exit_status(tmp_path / "s.json", status(0, launch_id="b"))
    assert read_exit_status(tmp_path / "s.json").exit_code == 0


def test_start_removes_the_status_of_an_earlier_launch_only(tmp_path):
    path = tmp_path / "s.json"
    forget_exit_status(path, "b")
    write_exit_status(path, status(78, launch_id="b"))  # another node of this launch was faster
    forget_exit_status(path, "b")
    assert path.exists()
    forget_exit_status(path, "c")
    assert not path.exists()
