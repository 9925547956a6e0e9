import signal
from dataclasses import replace

import pytest

from megatron_vlm.config import ExitCode
from megatron_vlm.platform.launch.exit_status import MAX_LINE, ExitStatus, error_line, write_exit_status
from megatron_vlm.platform.launch.heartbeat import Phase
from megatron_vlm.platform.launch.job_end import Patience, explain_end, read_reports, report_path
from megatron_vlm.platform.launch.launch import NodeEnd, WorkerEnd
from megatron_vlm.platform.launch.silence import SilentRank


def end(*exit_codes, stop=None, killed_here=(), unix_time=0.0):
    """Ranks 0, 1, ... in the order in which they ended."""
    workers = tuple(
        WorkerEnd(rank=rank, pid=100 + rank, exit_code=code, was_killed_here=rank in killed_here, unix_time=unix_time)
        for rank, code in enumerate(exit_codes)
    )
    return NodeEnd(workers=workers, stop_signal=stop)


def report(rank, code, message="", **facts):
    return ExitStatus(exit_code=code, message=message, rank=rank, **facts)


def lost(rank):
    return report(rank, 1, "RuntimeError: connection closed", is_symptom=True)


def explained(node_end, *reports, patience=None):
    status = explain_end(node_end, {item.rank: item for item in reports}, patience)
    return status.exit_code, status.message


def test_all_ranks_done_is_done():
    assert explained(end(0, 0), report(0, 0), report(1, 0)) == (0, "")


def test_error_with_a_name_goes_before_crashes_that_ended_earlier():
    crash, cause = lost(0), report(1, 65, "bad shard")
    assert explained(end(1, 65), crash, cause) == (65, "bad shard")


def test_error_with_a_name_goes_before_a_killed_rank():
    assert explained(end(-6, 70), report(1, 70, "loss is nan")) == (70, "loss is nan")


def test_killed_rank_is_named_before_the_crashes_it_causes():
    code, message = explained(end(1, -9), lost(0))
    assert code == ExitCode.CRASH
    assert message.startswith("rank 1 (process 101) was killed by SIGKILL; fix: ")


def test_ranks_killed_by_the_launcher_are_not_the_cause():
    crash = report(0, 1, "KeyError: 'x'")
    assert explained(end(1, -9, -9, killed_here=(1, 2)), crash) == (1, "rank 0 crashed: KeyError: 'x'")


def test_first_of_several_crashes_is_told_with_its_traceback():
    late, early = report(0, 1, "late", unix_time=2.0), report(1, 1, "early", unix_time=1.0, traceback="stack")
    status = explain_end(end(1, 1), {0: late, 1: early})
    assert (status.message, status.traceback, status.rank) == ("rank 1 crashed: early", "stack", 1)


def test_exit_code_says_what_happened_where_no_report_could_be_written():
    code, message = explained(end(74, 1))
    assert (code, message) == (74, "rank 0 ended with exit code 74; see its message above")


def test_crash_without_a_report_names_the_rank():
    assert explained(end(0, 2)) == (1, "rank 1 ended with exit code 2; see its output above")


def test_orderly_stop_asks_to_be_requeued():
    told = "stopped by SIGTERM at iteration 7"
    assert explained(end(75, 75, stop=signal.SIGTERM), report(0, 75, told)) == (75, told)


def test_ranks_that_die_of_the_signal_before_they_listen_ask_to_be_requeued():
    assert explained(end(-15, -15, stop=signal.SIGTERM)) == (75, "stopped by SIGTERM")


def test_rank_that_loses_its_peers_to_the_signal_is_no_crash():
    crash = lost(1)
    assert explained(end(-10, 1, stop=signal.SIGUSR1), crash)[0] == 75


def test_crash_while_stopping_is_a_crash():
    crash = report(0, 1, "KeyError: 'x'")
    assert explained(end(1, 75, stop=signal.SIGTERM), crash, report(1, 75))[0] == 1


def test_disk_error_while_stopping_is_a_disk_error():
    assert explained(end(74, 75, stop=signal.SIGTERM), report(0, 74, "disk full"), report(1, 75)) == (74, "disk full")


def test_rank_killed_while_stopping_is_named():
    assert "was killed by SIGKILL" in explained(end(-9, 75, stop=signal.SIGTERM))[1]


def test_interrupt_is_not_to_be_requeued():
    assert explained(end(-15, -15, stop=signal.SIGINT))[0] == ExitCode.INTERRUPTED


def test_ranks_that_the_interrupt_itself_reached_before_they_listened_were_stopped():
    crash = lost(1)
    assert explained(end(-2, 1, stop=signal.SIGINT), crash) == (ExitCode.INTERRUPTED, "stopped by SIGINT")


def test_run_that_was_done_when_the_signal_came_is_done():
    assert explained(end(0, 0, stop=signal.SIGTERM))[0] == 0


def test_requeue_without_a_signal_is_requeue():
    assert explained(end(75, 75), report(0, 75, "time limit near"), report(1, 75)) == (75, "time limit near")


def test_iteration_is_the_furthest_that_a_rank_reports():
    status = explain_end(end(0, 0), {0: report(0, 0, iteration=None), 1: report(1, 0, iteration=12)})
    assert status.iteration == 12


@pytest.mark.parametrize("code", [code for code in ExitCode if code not in (0, 75, 130)])
def test_no_failure_ends_with_exit_code_zero(code):
    assert explain_end(end(0, int(code)), {}).exit_code != 0


def test_reports_are_read_by_rank_and_missing_ones_left_out(tmp_path):
    write_exit_status(report_path(tmp_path, 3), report(3, 65, "x"))
    assert {rank: status.message for rank, status in read_reports(tmp_path, range(2, 5)).items()} == {3: "x"}


TEN_MINUTES = Patience(seconds=600, last_progress=1000.0)


def test_rank_that_waited_in_vain_is_a_timeout_and_the_one_that_did_not_wait_is_named():
    waited = report(0, 71, "timed out: Timed out waiting 600000ms for recv")
    code, message = explained(end(71, 1, -9, killed_here=(2,)), waited, lost(1))
    assert code == 71
    assert "rank 0 waited longer for other ranks than parallel.distributed_timeout_minutes; still running on" in message
    assert "this node: rank 2; fix: start the same command again" in message
    assert explained(end(71))[0] == 71  # without a report too


@pytest.mark.parametrize(("ended", "code"), [(1600.0, 71), (1599.0, 1)])
def test_abort_after_the_timeout_is_the_watchdogs_and_an_earlier_one_is_not(ended, code):
    found, message = explained(end(-6, -9, killed_here=(1,), unix_time=ended), patience=TEN_MINUTES)
    assert found == code
    assert ("(no step ended for that long, then it aborted)" in message) == (code == 71)
    assert ("was killed by SIGABRT" in message) == (code == 1)


def test_no_other_signal_is_taken_for_the_watchdogs():
    assert explained(end(-11, unix_time=9e9), patience=TEN_MINUTES)[0] == 1
    assert explained(end(-6, unix_time=9e9))[0] == 1


def test_what_a_timeout_may_come_from_goes_before_it():
    code, message = explained(end(-6, -9, unix_time=2000.0), patience=TEN_MINUTES)
    assert code == 1
    assert "rank 1 (process 101) was killed by SIGKILL" in message
    assert explained(end(71, 74), report(1, 74, "disk full"))[0] == 74


def hung(*, is_waiting=False):
    return SilentRank(
        rank=1,
        pid=101,
        phase=Phase.STEP,
        iteration=7,
        seconds=480.2,
        is_over_limit=True,
        is_stopped=not is_waiting,
        is_waiting=is_waiting,
        state="it is stopped (SIGSTOP or a debugger)",
        stack="Thread 1",
    )


def test_rank_that_hangs_is_named_with_its_stack_whatever_the_others_say():
    node_end = replace(end(71, -9, killed_here=(1,)), silent=hung())
    status = explain_end(node_end, {0: report(0, 71, "timed out")})
    assert (status.exit_code, status.rank, status.traceback, status.severity) == (71, 1, "Thread 1\n", 3)
    assert status.message.startswith(
        "rank 1 (process 101) was silent for 480 s in a step after iteration 7, longer than supervision.step_minutes "
        "allows: it is stopped (SIGSTOP or a debugger); fix: "
    )
    assert len(error_line(status.message)) <= MAX_LINE


def test_rank_that_others_gave_up_waiting_for_is_named_as_what_they_wait_for():
    message = replace(hung(), is_over_limit=False, seconds=0.0).message
    assert message == (
        "a collective took longer than parallel.distributed_timeout_minutes allows; the others seem to wait for rank 1 "
        "(process 101), in a step after iteration 7, silent for 0 s: it is stopped (SIGSTOP or a debugger)"
    )


def test_rank_that_waits_may_wait_for_another_node():
    assert explain_end(replace(end(-9, killed_here=(0,)), silent=hung(is_waiting=True)), {}).severity == 2


def test_hang_while_stopping_is_a_hang():
    assert explained(replace(end(-9, killed_here=(0,), stop=signal.SIGTERM), silent=hung()))[0] == 71


def test_of_a_crash_and_a_kill_the_first_counts():
    killed = end(-9, 1, unix_time=10.0)
    assert "was killed by SIGKILL" in explained(killed, report(1, 1, "KeyError: 'x'", unix_time=11.0))[1]
    assert explained(killed, report(1, 1, "KeyError: 'x'", unix_time=9.0))[1] == "rank 1 crashed: KeyError: 'x'"


def test_abort_and_lost_connections_follow_from_a_crash():
    assert explained(end(-6, 1, 1), report(1, 1, "KeyError: 'x'"), lost(2))[1] == "rank 1 crashed: KeyError: 'x'"
    assert "was killed by SIGABRT" in explained(end(1, -6), lost(0))[1]


def test_node_that_did_not_come_up_is_the_cause_unless_the_job_was_asked_to_stop():
    alone = replace(end(-9, killed_here=(0,)), missing=(1,))
    code, message = explained(alone)
    assert code == ExitCode.TIMEOUT
    assert message.startswith("node 1 did not come up within supervision.meeting_minutes; fix: ")
    assert len(error_line(message)) <= MAX_LINE
    assert explained(replace(alone, stop_signal=signal.SIGTERM))[0] == ExitCode.REQUEUE
