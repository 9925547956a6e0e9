import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_vlm.config.supervision import SupervisionConfig
from megatron_vlm.platform.launch import launch
from megatron_vlm.platform.launch.launch import NodeJob, find_free_port, run_node
from megatron_vlm.platform.launch.nodes import NodeLink
from megatron_vlm.platform.launch.silence import SilenceWatch

BLOCKED = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
# Rank 0 does the first thing, the others the second.
TWO_KINDS = "import os, sys; exec(sys.argv[1] if os.environ['RANK'] == '0' else sys.argv[2])"
LAUNCHER = """
import os, sys
from megatron_vlm.platform.launch.launch import NodeJob, run_node
environment = dict(os.environ, LAUNCHER_PID=str(os.getpid()))
job = NodeJob(command=[sys.executable, "-c", sys.argv[1]], environment=environment, num_workers=2, master_port=1)
end = run_node(job)
print("stop", end.stop_signal and end.stop_signal.name, sorted(worker.exit_code for worker in end.workers), flush=True)
"""
SAVES_ON_SIGNAL = r"""
import os, signal, sys, time
from megatron_vlm.platform.launch.parent import die_with_parent
die_with_parent(int(os.environ["LAUNCHER_PID"]))
def stop(number, frame):
    os.write(1, f"{signal.Signals(number).name}\n".encode())
    time.sleep(0.5)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
os.write(1, f"ready {os.getpid()}\n".encode())
while True:
    time.sleep(0.1)
"""


def job(first, others="", num_workers=2, **settings):
    command = [sys.executable, "-c", TWO_KINDS, first, others or first]
    return NodeJob(command=command, environment=os.environ, num_workers=num_workers, master_port=1, **settings)


def exit_codes(end):
    return {worker.rank: worker.exit_code for worker in end.workers}


def notice_signals():
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP ignored, and children inherit both."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launcher():
    """Start a launcher of two ranks; `launcher(code)` returns it and the pids of its ranks once they are ready."""
    started = []

    def start(code):
        command = [sys.executable, "-c", LAUNCHER, code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=notice_signals)
        started.append(process)
        return process, [int(process.stdout.readline().split()[1]) for _ in range(2)]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_every_rank_gets_torch_variables_of_its_own(tmp_path):
    code = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(repr(dict(os.environ)))"
    end = run_node(job(code, num_nodes=2, node_rank=1, master_address="gpu007"))
    assert exit_codes(end) == {2: 0, 3: 0}
    environments = {name: eval((tmp_path / name).read_text()) for name in ("2", "3")}
    assert [environments[name]["LOCAL_RANK"] for name in ("2", "3")] == ["0", "1"]
    for environment in environments.values():
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu007", "1")


def test_rank_killed_from_outside_ends_blocked_ranks_within_five_seconds():
    started = time.monotonic()
    end = run_node(job("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", BLOCKED, num_workers=3))
    assert time.monotonic() - started < 5
    assert exit_codes(end) == {0: -9, 1: -9, 2: -9}
    assert [worker.was_killed_here for worker in sorted(end.workers, key=lambda worker: worker.rank)] == [
        False,
        True,
        True,
    ]
    assert end.workers[0].signal_name == "SIGKILL"


def test_other_ranks_may_say_why_they_end_after_a_failure():
    end = run_node(job("raise SystemExit(65)", "import time; time.sleep(1); raise SystemExit(1)"))
    assert exit_codes(end) == {0: 65, 1: 1}
    assert not any(worker.was_killed_here for worker in end.workers)


@pytest.mark.parametrize("code", [0, 75])
def test_rank_that_ends_in_good_order_leaves_the_others_their_time(code, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    end = run_node(job(f"raise SystemExit({code})", f"import time; time.sleep(1); raise SystemExit({code})"))
    assert exit_codes(end) == {0: code, 1: code}


def test_what_a_dead_rank_had_started_dies_too(tmp_path):
    code = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(r"{tmp_path}/pid", "w").write(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_node(job(code, "pass"))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("sent", "handed_on"),
    [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_signal_is_handed_on_once_and_ranks_finish_their_save(launcher, sent, handed_on):
    process, _ = launcher(SAVES_ON_SIGNAL)
    process.send_signal(signal.Signals[sent])
    output, _ = process.communicate(timeout=20)
    assert output.splitlines() == [handed_on] * 2 + [f"stop {sent} [75, 75]"]


def test_third_interrupt_ends_ranks_that_do_not_listen(launcher):
    process, _ = launcher(
        "import signal, os, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.write(1, f'ready {os.getpid()}\\n'.encode()); time.sleep(60)"
    )
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=20)
    assert output.splitlines()[-1] == "stop SIGINT [-9, -9]"


def test_ranks_die_with_a_killed_launcher(launcher):
    process, pids = launcher(SAVES_ON_SIGNAL)
    process.kill()
    ranks = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]


def test_handlers_of_this_process_are_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    run_node(job("pass"))
    assert {number: signal.getsignal(number) for number in before} == before


def test_ranks_are_ended_when_they_cannot_all_be_started(monkeypatch, tmp_path):
    popen, pids = subprocess.Popen, []

    def popen_once(*args, **settings):
        if pids:
            raise OSError("no more processes")
        process = popen(*args, **settings)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen_once)
    with pytest.raises(OSError, match="no more processes"):
        run_node(job(BLOCKED))
    assert not psutil.pid_exists(pids[0])


def test_rank_that_the_kernel_does_not_let_die_is_named_and_left(monkeypatch, caplog):
    def never(self, timeout=None):
        raise subprocess.TimeoutExpired("rank", timeout)

    pids = []
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(subprocess.Popen, "wait", never)
    monkeypatch.setattr(os, "killpg", lambda pid, number: pids.append(pid))
    end = run_node(job("raise SystemExit(1)", "import time; time.sleep(6)"))
    assert exit_codes(end) == {0: 1, 1: -9}
    assert f"rank 1 (process {pids[-1]}) does not die" in caplog.text
    os.kill(pids[-1], signal.SIGKILL)


def test_ranks_are_ended_when_another_node_does_not_come_up(tmp_path):
    link = NodeLink(
        launch_id="job",
        node_rank=0,
        num_nodes=2,
        address="127.0.0.1",
        port=find_free_port(),
        meeting_seconds=0.5,
    )
    link.open()
    began = time.monotonic()
    end = run_node(job(BLOCKED), SilenceWatch(tmp_path, SupervisionConfig(), 10.0), link)
    link.close()
    assert time.monotonic() - began < 5
    assert end.missing == (1,)
    assert all(worker.was_killed_here for worker in end.workers)


def test_unknown_signal_is_named_by_its_number():
    end = run_node(job("import os; os.kill(os.getpid(), 40)", "pass"))
    assert {worker.signal_name for worker in end.workers} == {"signal 40", None}


def test_free_port_can_be_listened_on():
    assert 1024 < find_free_port() < 65536
