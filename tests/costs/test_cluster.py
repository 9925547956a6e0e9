import pytest

from megatron_vlm.costs.cluster import LATENCY, Cluster
from megatron_vlm.platform.gpus import GPUS

A100 = Cluster(gpu_name="A100")


def test_no_product_is_faster_than_the_data_sheet_and_small_ones_are_slower():
    def fraction(*shape):
        rows, inputs, outputs = shape
        return 2 * rows * inputs * outputs / A100.product_seconds(*shape) / GPUS["A100"].peak_flops

    assert fraction(128, 4096, 4096) < fraction(4096, 1024, 4096) < fraction(4096, 4096, 4096) < 1
    assert A100.product_seconds(0, 4096, 4096) == 0


@pytest.mark.parametrize("name", GPUS)
def test_seconds_grow_with_the_work(name):
    cluster = Cluster(gpu_name=name)
    for seconds in (cluster.attention_seconds, cluster.tower_seconds, cluster.memory_seconds):
        assert seconds(2e12) == pytest.approx(2 * seconds(1e12))
    # Never faster than the data sheet.
    assert cluster.memory_seconds(1e12) > 1e12 / cluster.gpu.bandwidth
    assert cluster.attention_seconds(1e12) > 1e12 / cluster.gpu.peak_flops


def test_a_group_inside_a_node_uses_nvlink_and_one_rank_sends_nothing():
    assert A100.exchange_seconds(1e9, 1, stride=1) == 0
    inside = A100.exchange_seconds(1e9, 8, stride=1)
    assert inside == pytest.approx(LATENCY + 7 / 8 * 1e9 / (300e9 * 0.75))


def test_a_group_over_nodes_uses_the_network_cards_of_all_its_ranks_in_a_node():
    whole_nodes = A100.exchange_seconds(1e9, 128, stride=1)
    every_second = A100.exchange_seconds(1e9, 64, stride=2)
    assert whole_nodes == pytest.approx(LATENCY + 127 / 128 * 1e9 / (8 * 25e9 * 0.75))
    # Half as many cards for half as many ranks of a node.
    assert every_second == pytest.approx(LATENCY + 63 / 64 * 1e9 / (4 * 25e9 * 0.75))


def test_messages_between_nodes_are_slower_than_inside_one():
    assert A100.message_seconds(1e8, stride=4) < A100.message_seconds(1e8, stride=8)


@pytest.mark.parametrize("link", ["nvlink", "infiniband"])
def test_more_bandwidth_is_never_slower(link):
    slow, fast = (Cluster(gpu_name="A100", **{link: speed}) for speed in (10e9, 100e9))
    for ranks, stride in ((2, 1), (8, 1), (16, 1), (64, 2), (2, 64)):
        assert fast.exchange_seconds(1e8, ranks, stride=stride) <= slow.exchange_seconds(1e8, ranks, stride=stride)
    assert fast.message_seconds(1e8, stride=1) <= slow.message_seconds(1e8, stride=1)
    assert fast.message_seconds(1e8, stride=8) <= slow.message_seconds(1e8, stride=8)


def test_assumptions_name_what_was_given():
    given = " ".join(Cluster(gpu_name="H100", infiniband=12.5e9, gpus_per_node=4).assumptions())
    for words in ("989 TFLOP/s", "InfiniBand 12.5 GB/s", "4 GPUs a node", "matrix products reach 65%"):
        assert words in given
