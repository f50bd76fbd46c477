import pytest

from gpt2.errors import UserError
from gpt2.memory import MACHINES
from gpt2.planning.hardware import ALIASES, GPUS, LINKS, build_cluster, find_gpu, interconnect


def test_each_gpu_names_its_links_and_sources():
    for gpu in GPUS.values():
        assert LINKS[gpu.link].between == "GPUs"
        assert LINKS[gpu.network].between == "nodes"
        assert 0 < gpu.mfu < 1
        assert gpu.mfu_source
        assert gpu.price_source
    assert set(ALIASES.values()) <= LINKS.keys()
    assert all(link.source for link in LINKS.values())


def test_the_memory_for_training_is_that_of_the_info_command():
    assert GPUS["t4"].memory_bytes == MACHINES["T4, 16 GB"]
    assert GPUS["rtx4090"].memory_bytes == MACHINES["GPU, 24 GB"]
    assert GPUS["h100"].memory_bytes == MACHINES["GPU, 80 GB"]


def test_gpus_stand_in_nodes():
    h100 = find_gpu("h100")
    cluster = build_cluster(h100, 64)
    assert (cluster.nodes, cluster.node_size) == (8, 8)
    assert (build_cluster(h100, 4).nodes, build_cluster(h100, 4).node_size) == (1, 4)
    assert build_cluster(h100, 64, node_size=16).nodes == 4
    assert build_cluster(h100, 16, node_size=1).nodes == 16


def test_names_choose_the_link_in_a_node_and_the_one_between_nodes():
    h100 = find_gpu("h100")
    assert interconnect(h100, []) == {"GPUs": "nvlink4", "nodes": "infiniband-400"}
    assert interconnect(h100, ["ethernet-25"]) == {"GPUs": "nvlink4", "nodes": "ethernet-25"}
    assert interconnect(h100, ["pcie4", "ethernet"]) == {"GPUs": "pcie4", "nodes": "ethernet-100"}
    assert interconnect(find_gpu("a100"), ["nvlink"])["GPUs"] == "nvlink3"
    cluster = build_cluster(h100, 16, ["pcie4", "ethernet-25"])
    assert (cluster.link, cluster.network) == (LINKS["pcie4"], LINKS["ethernet-25"])


def test_the_gpus_of_a_node_share_ethernet_and_have_an_infiniband_adapter_each():
    h100 = find_gpu("h100")
    assert build_cluster(h100, 16).network_bytes_per_s == LINKS["infiniband-400"].bytes_per_s
    assert build_cluster(h100, 16, ["ethernet"]).network_bytes_per_s == LINKS["ethernet-100"].bytes_per_s / 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), "--gpus is 0"),
        ((12,), "12 GPUs do not fill nodes of 8; expected a multiple of 8, or --gpus-per-node"),
        ((8, [], 0), "--gpus-per-node is 0"),
        ((8, ["token-ring"]), "no interconnect 'token-ring'; there are: nvlink3"),
        ((8, ["nvlink4", "pcie4"]), "two interconnects between GPUs: nvlink4 pcie4"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments, expected):
    with pytest.raises(UserError, match=expected):
        build_cluster(find_gpu("h100"), *arguments)


def test_an_unknown_gpu_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"no GPU 'h800'; there are: t4, .*h100"):
        find_gpu("h800")
