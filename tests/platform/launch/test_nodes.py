import socket
import threading
import time

import pytest

from megatron_vlm.platform.launch import nodes
from megatron_vlm.platform.launch.exit_status import ExitStatus
from megatron_vlm.platform.launch.launch import find_free_port
from megatron_vlm.platform.launch.nodes import NodeLink


@pytest.fixture
def links(monkeypatch):
    """Three nodes that have met."""
    monkeypatch.setattr(nodes, "SETTLE_SECONDS", 1.0)
    port = find_free_port()
    made = [make_link(rank, port) for rank in range(3)]
    for link in made:
        link.open()
    until(made, lambda: {peer.node for peer in made[0]._peers} == {1, 2})
    yield made
    for link in made:
        link.close()


def make_link(rank, port, launch_id="job", meeting_seconds=60.0):
    return NodeLink(
        launch_id=launch_id,
        node_rank=rank,
        num_nodes=3,
        address="127.0.0.1",
        port=port,
        meeting_seconds=meeting_seconds,
    )


def until(links, condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        for link in links:
            link.poll()
        time.sleep(0.01)


def settle(links, statuses):
    """Let all nodes end at once, and return their verdicts."""
    results = {}

    def end(node):
        results[node] = links[node].settle(statuses[node])

    threads = [threading.Thread(target=end, args=(node,)) for node in range(len(links))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(links))]


def failed(message, **facts):
    return ExitStatus(exit_code=1, message=message, **facts)


DONE = ExitStatus(exit_code=0, message="")


def test_failure_of_a_node_reaches_all_others(links):
    links[1].tell_failure()
    until(links, lambda: links[0].has_failure and links[2].has_failure, seconds=2)
    assert not links[1].has_failure


def test_all_agree_on_the_cause_and_one_says_it(links):
    links[2].tell_failure()
    until(links, lambda: links[0].has_failure and links[1].has_failure)
    statuses = [failed("lost 2", is_symptom=True), failed("lost 0", is_symptom=True), failed("killed")]
    verdicts = settle(links, statuses)
    assert {status.message for status, _ in verdicts} == {"killed"}
    assert [speaks for _, speaks in verdicts] == [True, False, False]


def test_of_causes_alike_that_of_the_node_counts_that_failed_first(links):
    links[1].tell_failure()
    until(links, lambda: links[0].has_failure)
    verdicts = settle(links, [failed(f"cause {rank}") for rank in range(3)])
    assert {status.message for status, _ in verdicts} == {"cause 1"}


def test_nodes_that_are_done_are_done(links):
    assert [status.exit_code for status, _ in settle(links, [DONE] * 3)] == [0, 0, 0]


def test_job_is_not_done_if_a_node_that_failed_does_not_say_why(links):
    links[1].tell_failure()
    until(links, lambda: links[0].has_failure and links[2].has_failure)
    verdicts = settle([links[0], links[2]], [DONE, DONE])
    assert {status.exit_code for status, _ in verdicts} == {1}
    assert all(status.message.startswith("node 1 failed and has not said why") for status, _ in verdicts)


def test_node_that_ends_without_a_word_is_named(links):
    links[1].close()
    until([links[0], links[2]], lambda: links[0].has_failure and links[2].has_failure, seconds=2)
    verdicts = settle([links[0], links[2]], [failed("lost a rank", is_symptom=True)] * 2)
    assert all(status.message.startswith("node 1 was lost") for status, _ in verdicts)


def test_loss_of_the_first_node_is_noticed_by_the_others(links):
    links[0].close()
    until(links[1:], lambda: links[1].has_failure and links[2].has_failure, seconds=2)
    status, speaks = links[1].settle(failed("lost a rank", is_symptom=True))
    assert status.message.startswith("node 0 was lost")
    assert speaks


def test_node_that_comes_late_hears_of_the_failure():
    port = find_free_port()
    first, late = make_link(0, port), make_link(1, port)
    first.open()
    first.tell_failure()
    until([first, late], lambda: late.has_failure)
    first.close(), late.close()


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", b'{"node": 1, "launch_id": "other"}\n', b"[]\n", b"5\n"])
def test_stranger_is_sent_away_and_harms_nothing(text):
    link = make_link(0, find_free_port())
    link.open()
    with socket.create_connection(("127.0.0.1", link.port)) as stranger:
        until([link], lambda: link._peers)
        stranger.sendall(text)
        until([link], lambda: not link._peers)
    assert not link.has_failure
    link.close()


def test_port_that_is_taken_is_no_end_of_the_job(caplog):
    with socket.create_server(("", 0)) as other:
        link = make_link(0, other.getsockname()[1])
        link.open()
    assert "is noticed late" in caplog.text
    assert link.settle(DONE) == (DONE, True)
    link.close()


def test_another_program_at_the_port_of_the_first_node_is_not_taken_for_it():
    first = make_link(0, find_free_port(), launch_id="other")
    first.open()
    other = make_link(1, first.port)
    until([first, other], lambda: other._peers)
    until([first, other], lambda: not other._peers)
    assert not other.has_failure
    assert not first.has_failure
    first.close(), other.close()


def test_nodes_that_do_not_come_up_are_named_in_time(caplog):
    first, second = (make_link(rank, port, meeting_seconds=0.6) for port in [find_free_port()] for rank in (0, 1))
    for link in (first, second):
        link.open()
    until([first, second], lambda: first._met == {1})
    assert first.find_overdue() == ()
    until([first], lambda: time.monotonic() > first._opened_at + 0.3)
    assert (first.find_overdue(), first.find_overdue()) == ((), ())
    assert caplog.text.count("node 2 of 3 not up after") == 1
    until([first], lambda: time.monotonic() > first._opened_at + 0.6)
    assert (first.find_overdue(), second.find_overdue()) == ((2,), ())
    first.close(), second.close()


def test_node_misses_the_first_one_and_nobody_is_missed_where_none_can_be_heard():
    with socket.create_server(("", 0)) as other:
        first, second = (make_link(rank, other.getsockname()[1], meeting_seconds=0.0) for rank in (0, 1))
        first.open(), second.open()
    assert (first.find_overdue(), second.find_overdue()) == ((), (0,))
    first.close(), second.close()


def test_many_nodes_have_a_short_name():
    assert nodes.name_nodes([3]) == "node 3"
    assert nodes.name_nodes(range(1, 12)) == "nodes 1, 2, 3, 4, 5, 6, 7, 8 and 3 others"


def test_nodes_that_come_together_are_all_met_at_once():
    first = make_link(0, find_free_port())
    first.open()
    waiting = [socket.create_connection(("127.0.0.1", first.port)) for _ in range(50)]
    first.poll()
    assert len(first._peers) == len(waiting)
    first.close()
    for connection in waiting:
        connection.close()


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_nodes_meet_by_addresses_of_either_kind(address, family):
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip("this machine has no such address")
    first = make_link(0, find_free_port())
    first.open()
    socket.create_connection((address, first.port), timeout=1).close()
    first.close()
