import pytest

from gpt2.planning.communication import (
    all_gather_s,
    all_gather_sent,
    all_reduce_s,
    all_reduce_sent,
    reduce_scatter_s,
)
from gpt2.planning.hardware import Cluster, Link

NODE = Link(1e-6, 100e9, "GPUs", "")
NETWORK = Link(10e-6, 10e9, "nodes", "")
SHARED = Link(10e-6, 10e9, "nodes", "", shared=True)


def test_a_ring_in_a_node():
    cluster = Cluster(4, 4, NODE, NETWORK)
    assert all_gather_s(1e9, cluster) == pytest.approx(3 * 1e-6 + 3 / 4 * 1e9 / 100e9)
    assert reduce_scatter_s(1e9, cluster) == all_gather_s(1e9, cluster)
    assert all_reduce_s(1e9, cluster) == pytest.approx(6 * 1e-6 + 6 / 4 * 1e9 / 100e9)


def test_a_ring_over_nodes_of_one_gpu():
    cluster = Cluster(4, 1, NODE, NETWORK)
    assert all_reduce_s(1e9, cluster) == pytest.approx(6 * 10e-6 + 6 / 4 * 1e9 / 10e9)


def test_each_gpu_sends_its_part_to_other_nodes():
    cluster = Cluster(16, 8, NODE, NETWORK)
    within = 7 * 1e-6 + 7 / 8 * 1e9 / 100e9
    between = 10e-6 + 1 / 2 * (1e9 / 8) / 10e9
    assert all_gather_s(1e9, cluster) == pytest.approx(within + between)
    shared = Cluster(16, 8, NODE, SHARED)  # the same as if one of them sent all
    assert all_gather_s(1e9, shared) == pytest.approx(within + 10e-6 + 1 / 2 * 1e9 / 10e9)


@pytest.mark.parametrize("node_size", [1, 2, 4, 8])
def test_bytes_are_the_same_in_nodes_and_in_one_ring(node_size):
    g, m, n = node_size, 8 // node_size, 1e9
    assert (g - 1) / g * n + (m - 1) / m * n / g == pytest.approx(all_gather_sent(n, 8))
    assert all_reduce_sent(n, 8) == 2 * all_gather_sent(n, 8) == pytest.approx(2 * 7 / 8 * n)


def test_one_gpu_sends_nothing():
    assert all_reduce_s(1e9, Cluster(1, 1, NODE, NETWORK)) == 0
    assert all_reduce_sent(1e9, 1) == 0
