from dataclasses import replace

import pytest

from gpt2.config import PRESETS
from gpt2.planning.communication import all_gather_s, all_reduce_s, reduce_scatter_s
from gpt2.planning.hardware import Cluster, Link, build_cluster, find_gpu
from gpt2.planning.step import BUCKET_BYTES, Work, Workload, bytes_sent, step_time

XL = PRESETS["gpt2-xl"]
WORKLOAD = Workload.of(XL, 1024)
WORK = Work(micro_batch_tokens=8192, micro_batches=2, flops_per_s=400e12, bytes_per_s=3e12)
H100 = find_gpu("h100")
FAST, SLOW = (Link(0, speed, "GPUs", "") for speed in (1e18, 1e9))


def pair(link):
    return Cluster(2, 2, link, link)


@pytest.mark.parametrize("name", PRESETS)
def test_a_workload_has_the_parameters_of_the_model(name):
    config = PRESETS[name]
    workload = Workload.of(config, 1024)
    assert workload.parameters == config.num_parameters()
    assert workload.other_parameters == (config.vocab_size + config.block_size) * config.n_embd + 2 * config.n_embd
    assert workload.flops_per_token == config.flops_per_token(1024)


def test_one_gpu_computes_and_communicates_nothing():
    time = step_time("ddp", WORKLOAD, WORK, Cluster(1, 1, FAST, FAST))
    assert time.communication_s == time.exposed_s == 0
    assert time.compute_s == pytest.approx(WORKLOAD.flops_per_token * 2 * 8192 / 400e12)
    assert time.optimizer_s == pytest.approx(30 * WORKLOAD.parameters / 3e12)
    assert time.total_s == pytest.approx(time.compute_s + time.optimizer_s)


def test_gradient_checkpointing_computes_the_forward_pass_twice():
    plain, twice = (step_time("ddp", WORKLOAD, replace(WORK, checkpointing=c), pair(FAST)) for c in (False, True))
    assert twice.compute_s == pytest.approx(4 / 3 * plain.compute_s)


def test_ddp_hides_what_fits_beside_one_backward_pass_but_not_the_embeddings():
    fast = step_time("ddp", WORKLOAD, WORK, build_cluster(H100, 8))
    embeddings = 4 * WORKLOAD.other_parameters
    count = round(embeddings / BUCKET_BYTES)
    assert fast.exposed_s == pytest.approx(count * all_reduce_s(embeddings / count, build_cluster(H100, 8)))
    slow = step_time("ddp", WORKLOAD, WORK, pair(SLOW))
    assert slow.communication_s == pytest.approx(4 * WORKLOAD.parameters / 1e9, rel=1e-3)
    assert slow.exposed_s == pytest.approx(slow.communication_s - WORK.backward_s(WORKLOAD), rel=1e-3)


def test_ddp_communicates_once_in_a_step_and_fsdp_in_each_micro_batch():
    more = replace(WORK, micro_batches=8)
    cluster = build_cluster(H100, 8)
    ddp, fsdp = (
        [step_time(strategy, WORKLOAD, work, cluster).communication_s for work in (WORK, more)]
        for strategy in ("ddp", "fsdp")
    )
    assert ddp[1] == ddp[0]
    assert fsdp[1] == pytest.approx(4 * fsdp[0])


def test_fsdp_hides_blocks_behind_blocks_but_not_the_embeddings():
    cluster = build_cluster(H100, 8)
    other = WORKLOAD.other_parameters
    time = step_time("fsdp", WORKLOAD, WORK, cluster)
    assert time.exposed_s == pytest.approx(
        2 * (all_gather_s(2 * other, cluster) + reduce_scatter_s(4 * other, cluster))
    )
    slow = step_time("fsdp", WORKLOAD, WORK, pair(SLOW))
    hidden = slow.communication_s - slow.exposed_s
    assert hidden == pytest.approx(slow.compute_s)  # all of the computation


def test_fsdp_divides_the_optimizer():
    ddp, fsdp = (step_time(strategy, WORKLOAD, WORK, build_cluster(H100, 8)) for strategy in ("ddp", "fsdp"))
    assert fsdp.optimizer_s == pytest.approx(ddp.optimizer_s / 8)


def test_muon_divides_its_orthogonalization_and_exchanges_the_updates():
    C = 1600
    # a matrix of m x n, m <= n: 4 m^2 n + 2 m^3 in each of five iterations
    per_block = sum(4 * C * C * n + 2 * C**3 for n in (3 * C, C, 4 * C, 4 * C))
    assert WORKLOAD.newton_schulz_flops() == 5 * 48 * per_block
    muon = replace(WORK, optimizer="muon")
    cluster = build_cluster(H100, 8)
    time, without = (step_time("ddp", WORKLOAD, work, cluster) for work in (muon, WORK))
    exchange_s = all_gather_s(2 * 48 * 12 * C * C, cluster)
    assert time.exposed_s - without.exposed_s == pytest.approx(exchange_s)
    alone = step_time("ddp", WORKLOAD, muon, Cluster(1, 1, FAST, FAST))
    assert alone.optimizer_s - time.optimizer_s == pytest.approx(7 / 8 * WORKLOAD.newton_schulz_flops() / 400e12)


def test_bytes_sent_in_a_step():
    n = WORKLOAD.parameters
    assert bytes_sent("ddp", WORKLOAD, 3, 4) == {"all-reduce": pytest.approx(2 * 3 / 4 * 4 * n)}
    sent = bytes_sent("fsdp", WORKLOAD, 3, 4)
    blocks = 48 * WORKLOAD.block_parameters
    assert sent["reduce-scatter"] == pytest.approx(3 * 3 / 4 * 4 * n)
    assert sent["all-gather"] == pytest.approx(3 * 3 / 4 * 2 * (n + blocks))
