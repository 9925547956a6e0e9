"""Compare what the members of each process group called: the same collectives, with the same sizes, in the same order.

A job hangs where they differ, or goes on with wrong numbers: NCCL pairs calls by their order and checks no sizes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megatron_vlm.platform.fake_device.events import Collective, Group
from megatron_vlm.training.rehearsal.facts import RankFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first calls of two ranks that do not match."""

    group: Group
    position: int
    """Of the calls among those of the group, from 0; of messages, among those from one rank to the other."""
    ranks: tuple[int, int]
    calls: tuple[Collective | None, Collective | None]
    """None where a rank makes no further call."""

    def describe(self) -> str:
        """Return both calls with all that is known of them."""
        said = [f"{call.amount} at {call.where}" if call else "no further call" for call in self.calls]
        return f"{self._heading(self.group.describe())}: {said[0]}, and {said[1]}"

    def summarise(self) -> str:
        """Return both calls in a few words."""
        said = [f"{call.amount} ({call.place})" if call else "no further call" for call in self.calls]
        return f"{self._heading(self.group.name)}: {said[0]}, {said[1]}"

    def _heading(self, group: str) -> str:
        return f"ranks {self.ranks[0]} and {self.ranks[1]} differ in call {self.position + 1} of {group}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Played members of a group whose calls were compared."""

    group: Group
    ranks: tuple[int, ...]
    num_calls: int
    """Of the first of them in one step."""
    are_messages: bool = False
    """Whether they are messages from the first rank to the second; collectives otherwise."""


def compare_ranks(played: Sequence[RankFacts]) -> tuple[list[Compared], list[Difference]]:
    """Compare the collectives of all played ranks that share a group, and the messages between them.

    Returns:
        What was compared, and the first difference of each pair.
    """
    calls: dict[Group, dict[int, list[Collective]]] = defaultdict(dict)
    messages: dict[tuple[Group, int, int], dict[str, list[Collective]]] = defaultdict(lambda: {"send": [], "recv": []})
    for facts in played:
        for call in facts.collectives:
            if len(call.group.ranks) == 1:
                continue
            if call.op in ("send", "recv"):
                assert call.peer is not None
                ends = (facts.rank, call.peer) if call.op == "send" else (call.peer, facts.rank)
                messages[call.group, ends[0], ends[1]][call.op].append(call)
            else:
                calls[call.group].setdefault(facts.rank, []).append(call)
    _add_silent_members(calls, [facts.rank for facts in played])
    compared, differences = _compare_groups(calls)
    more_compared, more_differences = _compare_messages(messages, {facts.rank for facts in played})
    return compared + more_compared, differences + more_differences


def _add_silent_members(calls: dict[Group, dict[int, list[Collective]]], ranks: Sequence[int]) -> None:
    for group, by_rank in calls.items():
        for rank in set(ranks).intersection(group.ranks):
            by_rank.setdefault(rank, [])


def _compare_groups(calls: dict[Group, dict[int, list[Collective]]]) -> tuple[list[Compared], list[Difference]]:
    compared, differences = [], []
    for group, by_rank in calls.items():
        first, *others = sorted(by_rank)
        if not others:
            continue
        compared.append(Compared(group=group, ranks=(first, *others), num_calls=len(by_rank[first])))
        for other in others:
            if found := _first_difference(group, (first, other), (by_rank[first], by_rank[other]), "signature"):
                differences.append(found)
    return compared, differences


def _compare_messages(
    messages: dict[tuple[Group, int, int], dict[str, list[Collective]]], played: set[int]
) -> tuple[list[Compared], list[Difference]]:
    compared, differences = [], []
    for (group, sender, receiver), by_op in messages.items():
        if not {sender, receiver} <= played:
            continue
        ends, count = (sender, receiver), len(by_op["send"])
        compared.append(Compared(group=group, ranks=ends, num_calls=count, are_messages=True))
        if found := _first_difference(group, ends, (by_op["send"], by_op["recv"]), "content"):
            differences.append(found)
    return compared, differences


def _first_difference(
    group: Group, ranks: tuple[int, int], calls: tuple[list[Collective], list[Collective]], what: str
) -> Difference | None:
    """Return the first calls that differ in the attribute `what`."""
    for position, (one, other) in enumerate(zip_longest(*calls)):
        if one is None or other is None or getattr(one, what) != getattr(other, what):
            return Difference(group=group, position=position, ranks=ranks, calls=(one, other))
    return None
