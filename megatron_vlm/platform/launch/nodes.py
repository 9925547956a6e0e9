"""Let the launchers of a job talk: a failure on one node ends the others at once, and one line names its first cause.

The launcher of the first node listens, the others connect. It imports no torch, whose store would do the same: that
takes longer than most jobs need to fail. The kernel notices a node that is switched off (keep-alive), and answers for
a launcher that is merely suspended.
"""

import json
import logging
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_vlm.config import ExitCode
from megatron_vlm.platform.launch.exit_status import ExitStatus

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 1 << 20
_CONNECT_SECONDS = 1.0
_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 5.0
"""Before the second attempt to connect, and before later ones: where a firewall drops packets, each takes a second."""
_BACKLOG = 4096
"""Nodes that may connect at once; the kernel has its own bound."""
SETTLE_SECONDS = 8.0
"""How long a failed node waits for the reports of the others; each of them has its grace of 3 s."""
_VERDICT_SECONDS = 2.0
"""Beyond that, for the verdict of the first node, which waits as long for the reports."""
_ORDERLY_SECONDS = 60.0
_POLL_SECONDS = 0.05
_MAX_NAMED = 8
# Seconds of silence before a dead machine is asked, between questions, and questions: 2 minutes together, which the
# network of the launchers may fail without harm to the run.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6))


@dataclass(slots=True)
class _Peer:
    """A connection to the launcher of another node."""

    connection: socket.socket
    node: int | None = None
    """None until it has introduced itself: another program may have the port."""
    received: bytes = b""


@dataclass(slots=True)
class NodeLink:
    """The launchers of the other nodes, as this one sees them; nothing happens outside of its methods."""

    launch_id: str
    node_rank: int
    num_nodes: int
    address: str
    port: int
    meeting_seconds: float
    """How long the others have to come up."""
    has_failure: bool = False
    """Whether a rank of another node has failed, or another node was lost."""
    statuses: dict[int, ExitStatus] = field(default_factory=dict)
    """How other nodes ended, in the order in which they said so."""
    verdict: ExitStatus | None = None
    """The first node's word on the whole job."""
    _met: set[int] = field(default_factory=set)
    _opened_at: float = 0.0
    _is_told: bool = False
    _failing: list[int] = field(default_factory=list)
    """Nodes in the order in which they failed, this one included."""
    _peers: list[_Peer] = field(default_factory=list)
    _listener: socket.socket | None = None
    _retry_at: float = 0.0
    _retry_seconds: float = _RETRY_SECONDS
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def open(self) -> None:
        """Listen, on the first node; the others connect whenever it does."""
        self._opened_at = time.monotonic()
        if self.node_rank:
            return
        try:
            self._listener = _listen(self.port)
        except OSError as error:
            logger.warning("port %d cannot be used (%s): a failure of another node is noticed late", self.port, error)
            return
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Close all connections."""
        for peer in self._peers:
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def poll(self) -> None:
        """Read what other launchers have sent; does not wait."""
        if self.node_rank and not self._peers and time.monotonic() >= self._retry_at:
            self._connect()
        if not self._selector.get_map():
            return
        for key, _ in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.data)

    def find_overdue(self) -> tuple[int, ...]:
        """Return the nodes that have not come up in their time; name them in the log after half of it.

        The others know of the first node only.
        """
        passed = time.monotonic() - self._opened_at
        if passed < self.meeting_seconds / 2:
            return ()
        missing = tuple(node for node in self._expected() if node not in self._met)
        if missing and not self._is_told:
            self._is_told = True
            logger.warning("%s of %d not up after %.0f s, waiting", name_nodes(missing), self.num_nodes, passed)
        return missing if passed >= self.meeting_seconds else ()

    def _expected(self) -> Sequence[int]:
        if self.node_rank:
            return (0,)
        return range(1, self.num_nodes) if self._listener is not None else ()

    def tell_failure(self) -> None:
        """Tell the other nodes that a rank of this one has failed; why follows with `settle`."""
        self._note_failure(self.node_rank)
        self._send({"failing": self.node_rank})

    def settle(self, status: ExitStatus) -> tuple[ExitStatus, bool]:
        """Return how the whole job ended, and whether this node is the one to say so.

        Args:
            status: of this node.
        """
        is_orderly = status.severity <= 1
        patience = SETTLE_SECONDS + (_VERDICT_SECONDS if self.node_rank else 0.0)
        deadline = time.monotonic() + (_ORDERLY_SECONDS if is_orderly else patience)
        if not is_orderly:
            self._note_failure(self.node_rank)
        self._send({"status": asdict(status)})
        while time.monotonic() < deadline and self.verdict is None and self._is_expecting():
            if self.has_failure and is_orderly:
                is_orderly, deadline = False, min(deadline, time.monotonic() + patience)
            self.poll()
            time.sleep(_POLL_SECONDS)
        if self.verdict is not None and self.verdict.severity >= status.severity:
            return self.verdict, False
        verdict = self._judge({**self.statuses, self.node_rank: status})
        if self.node_rank == 0:
            self._send({"verdict": asdict(verdict)})
        return verdict, True

    def _is_expecting(self) -> bool:
        if self.node_rank:
            return bool(self._peers)
        return any(peer.node not in self.statuses for peer in self._peers)

    def _judge(self, statuses: Mapping[int, ExitStatus]) -> ExitStatus:
        """Return the status that explains most; among equals, that of the node that failed first."""
        order = [*self._failing, *statuses]
        found = min(statuses.items(), key=lambda item: (-item[1].severity, order.index(item[0])))[1]
        if found.severity or not self._failing:
            return found
        # The launcher of the node that failed has not reported in time: its ranks may be stuck in the kernel.
        return ExitStatus(
            exit_code=int(ExitCode.CRASH),
            message=f"node {self._failing[0]} failed and has not said why; fix: look at what its launcher prints, then "
            "start the same command again: it resumes from the last checkpoint",
            is_symptom=True,
        )

    def _note_failure(self, node: int) -> None:
        if node not in self._failing:
            self._failing.append(node)
        self.has_failure |= node != self.node_rank

    def _connect(self) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _MAX_RETRY_SECONDS)
        with suppress(OSError):  # the first node is not up yet, or its port was taken
            self._add(socket.create_connection((self.address, self.port), timeout=_CONNECT_SECONDS))
            self._introduce(self._peers[-1])

    def _introduce(self, peer: _Peer) -> None:
        self._send({"node": self.node_rank, "launch_id": self.launch_id}, [peer])

    def _accept(self) -> None:
        with suppress(OSError):  # none is left
            while self._listener is not None:
                self._add(self._listener.accept()[0])

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(_CONNECT_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE:
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(65536)
        except OSError:
            received = b""
        peer.received += received
        *lines, peer.received = peer.received.split(b"\n")
        try:
            for line in lines:
                self._take(peer, json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError):  # somebody else's program
            received = b""
        if not received or len(peer.received) > _MAX_MESSAGE:
            self._drop(peer)

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.node is None:
            if message["launch_id"] != self.launch_id:
                raise ValueError("another job")
            peer.node = int(message["node"])
            self._met.add(peer.node)
            if self.node_rank == 0:
                self._introduce(peer)
            if self._failing:
                self._send({"failing": self._failing[0]})
        elif "failing" in message:
            self._note_failure(int(message["failing"]))
            if self.node_rank == 0:
                self._send(message)
        elif "status" in message:
            self.statuses[peer.node] = status = ExitStatus(**message["status"])
            if status.severity > 1:
                self._note_failure(peer.node)
        elif "verdict" in message:
            self.verdict = ExitStatus(**message["verdict"])

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)
        if peer.node is not None and peer.node not in self.statuses and self.verdict is None:
            self._lose(peer.node)

    def _lose(self, node: int) -> None:
        self._note_failure(node)
        self.statuses[node] = ExitStatus(
            exit_code=int(ExitCode.CRASH),
            message=f"node {node} was lost: its launcher ended without a word; fix: look for the out-of-memory killer "
            "and for faults of that machine, then start the same command again: it resumes from the last checkpoint",
        )
        if self.node_rank == 0:
            self._send({"failing": node})

    def _send(self, message: Mapping[str, Any], peers: Sequence[_Peer] | None = None) -> None:
        """Send to some peers, by default to all; the first node says nothing to those that it does not know."""
        line = json.dumps(message).encode() + b"\n"
        known = [peer for peer in self._peers if self.node_rank or peer.node is not None]
        for peer in known if peers is None else peers:
            with suppress(OSError):  # a lost peer is noticed when it is read
                peer.connection.sendall(line)


def name_nodes(nodes: Sequence[int]) -> str:
    """Return `node 3`, or `nodes 3, 4 and 5 others`."""
    named = ", ".join(map(str, nodes[:_MAX_NAMED]))
    others = f" and {len(nodes) - _MAX_NAMED} others" if len(nodes) > _MAX_NAMED else ""
    return f"node{'s' if len(nodes) > 1 else ''} {named}{others}"


def _listen(port: int) -> socket.socket:
    """Listen for IPv4 and IPv6: nodes may know the first one by an address of either kind."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 is switched off, or the port is taken, which the other try tells
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)
