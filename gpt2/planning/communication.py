"""Time and bytes of collectives, in the alpha-beta model.

A message of n bytes takes alpha + n / beta (Hockney 1994, https://doi.org/10.1016/S0167-8191(06)80021-9). Rings of p
processes send it in p - 1 steps of n / p bytes (Thakur, Rabenseifner and Gropp 2005,
https://doi.org/10.1177/1094342005051521), which is the least that each process has to send (Patarasu and Yuan 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002). Across nodes the collectives are hierarchical: rings in each node, and
rings between the GPUs with the same number in all nodes, each with its part of the message.
"""

from gpt2.planning.hardware import Cluster


def all_gather_s(count: float, cluster: Cluster) -> float:
    """Seconds until each process has all `count` bytes, of which each had 1/p.

    g GPUs in each of m nodes: (m - 1) alpha + (m - 1)/m (n/g) / beta between nodes, and (g - 1) alpha + (g - 1)/g n /
    beta in the node.
    """
    g, m = cluster.node_size, cluster.nodes
    within = (g - 1) * (cluster.link.latency_s + count / g / cluster.link.bytes_per_s)
    between = (m - 1) * (cluster.network.latency_s + count / g / m / cluster.network_bytes_per_s)
    return within + between


def reduce_scatter_s(count: float, cluster: Cluster) -> float:
    """Seconds until each process has the sum of 1/p of `count` bytes: an all-gather backwards."""
    return all_gather_s(count, cluster)


def all_reduce_s(count: float, cluster: Cluster) -> float:
    """Seconds until each process has the sum of `count` bytes: a reduce-scatter, then an all-gather."""
    return reduce_scatter_s(count, cluster) + all_gather_s(count, cluster)


def all_gather_sent(count: float, processes: int) -> float:
    """Bytes that each process sends in an all-gather (or reduce-scatter) of `count` bytes: (p - 1)/p n."""
    return count * (processes - 1) / processes


def all_reduce_sent(count: float, processes: int) -> float:
    """Bytes that each process sends in an all-reduce of `count` bytes: 2 (p - 1)/p n."""
    return 2 * all_gather_sent(count, processes)
