from collections import Counter

from megatron_vlm.platform.fake_device.events import Collective, Group
from megatron_vlm.training.rehearsal.comparison import compare_ranks
from megatron_vlm.training.rehearsal.facts import RankFacts

DATA, STAGES, ALONE = Group("data parallel", (0, 1)), Group("pipeline", (0, 2)), Group("own", (0,))


def call(op="allreduce", group=DATA, sizes=(8,), dtype="float32", line=1, peer=None):
    return Collective(op, group, dtype, sizes, f"models/vlm.py:{line}", peer)


def rank(number, *calls):
    return RankFacts(
        rank=number,
        pp_rank=number // 2,
        tp_rank=0,
        cp_rank=0,
        dp_rank=number % 2,
        parameters=1,
        learning=1,
        weights=1,
        gradients=1,
        optimizer=1,
        peaks={},
        waits=Counter(),
        collectives=calls,
        image_counts=(),
        label_counts=(),
        checkpoint=0,
    )


def test_ranks_with_the_same_calls_agree_wherever_they_make_them():
    compared, differences = compare_ranks(
        [rank(0, call(), call("allgather")), rank(1, call(line=2), call("allgather"))]
    )
    assert not differences
    assert [(one.ranks, one.num_calls) for one in compared] == [((0, 1), 2)]


def test_first_call_that_differs_is_named_with_both_places():
    _, (found,) = compare_ranks(
        [rank(0, call(), call(sizes=(4,), line=5)), rank(1, call(), call(sizes=(1600,), line=9))]
    )
    assert found.position == 1
    assert found.describe() == (
        "ranks 0 and 1 differ in call 2 of data parallel of 2 ranks (0, 1): allreduce of 4 float32 at models/vlm.py:5, "
        "and allreduce of 1,600 float32 at models/vlm.py:9"
    )


def test_rank_that_stops_calling_or_never_calls_differs():
    _, (fewer,) = compare_ranks([rank(0, call(), call()), rank(1, call())])
    assert (fewer.position, fewer.calls[1]) == (1, None)
    _, (silent,) = compare_ranks([rank(0, call()), rank(1)])
    assert "no further call" in silent.summarise()


def test_types_operators_and_roots_must_agree_too():
    for other in (call(dtype="bfloat16"), call("allgather"), call(peer=1)):
        assert compare_ranks([rank(0, call()), rank(1, other)])[1]


def test_messages_are_compared_with_those_of_the_receiver():
    sent = [call("send", STAGES, sizes, peer=2) for sizes in ((8,), (4,))]
    received = [call("recv", STAGES, sizes, peer=0) for sizes in ((8,), (4,))]
    (one,), differences = compare_ranks([rank(0, *sent), rank(2, *received)])
    assert (one.ranks, one.num_calls, one.are_messages, differences) == ((0, 2), 2, True, [])
    _, (swapped,) = compare_ranks([rank(0, *sent), rank(2, *reversed(received))])
    assert swapped.position == 0
    _, (missing,) = compare_ranks([rank(0, *sent), rank(2, received[0])])
    assert missing.position == 1


def test_groups_of_one_and_peers_that_are_not_played_are_left_out():
    assert compare_ranks([rank(0, call(group=ALONE), call("send", STAGES, peer=2)), rank(1)]) == ([], [])
