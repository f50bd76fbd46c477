from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from gpt2.config import PRESETS, GPTConfig, TrainConfig
from gpt2.errors import UserError
from gpt2.memory import training_bytes
from gpt2.planning.hardware import build_cluster, find_gpu
from gpt2.planning.plan import Plan, Run, best, divisors, memory_per_device, plan, plans
from tests.conftest import ROOT

H100, T4 = find_gpu("h100"), find_gpu("t4")
XL = Run(PRESETS["gpt2-xl"], 512, 1024, 32e9, "adamw")
SMALL = Run(PRESETS["gpt2"], 512, 1024, 10e9, "adamw")


def make(run, gpu, gpus, **options):
    return plans(
        run, gpu, build_cluster(gpu, gpus, **options), flops_per_s=gpu.mfu * gpu.peak_flops, dollars_per_hour=2
    )


def test_ddp_takes_the_memory_that_training_on_one_device_takes():
    memory = memory_per_device(SMALL, "ddp", 8, 16)
    expected = training_bytes(PRESETS["gpt2"], 16, 1024, reduced_precision=True, on_cpu=False)
    assert memory.total == pytest.approx(expected)
    assert memory == memory_per_device(SMALL, "fsdp", 1, 16)


def test_fsdp_shards_all_but_what_is_in_use():
    small, large = (memory_per_device(XL, "fsdp", gpus, 1) for gpus in (8, 64))
    parameters = XL.config.num_parameters()
    assert small.optimizer_state == 8 * parameters / 8
    assert small.weights - large.weights == pytest.approx(4 * parameters * (1 / 8 - 1 / 64))
    assert large.weights > 2 * (50257 + 1024) * 1600  # the embeddings in bf16
    assert large.total < memory_per_device(XL, "ddp", 64, 1).total / 5


def test_muon_has_one_momentum_for_the_matrices():
    muon = memory_per_device(replace(XL, optimizer="muon"), "ddp", 8, 1)
    less = memory_per_device(XL, "ddp", 8, 1).optimizer_state - muon.optimizer_state
    assert less == 4 * 48 * 12 * 1600**2


def test_the_micro_batch_is_the_largest_that_fits_and_divides():
    for each in make(XL, H100, 8):
        assert each.micro_batch * each.micro_batches * 8 == 512
        assert each.memory.total <= H100.memory_bytes
        larger = next(n for n in reversed(divisors(64)) if n > each.micro_batch)
        assert memory_per_device(XL, each.strategy, 8, larger).total > H100.memory_bytes


def test_gradient_checkpointing_where_nothing_else_fits_or_where_it_saves_communication():
    ddp, fsdp = make(XL, T4, 8, node_size=8)
    assert ddp.micro_batch == 0
    assert fsdp.checkpointing
    assert fsdp.micro_batch > 2  # without it, 2 fit, and more than half of the time is communication
    assert not any(each.checkpointing for each in make(XL, H100, 8))


def test_what_does_not_fit_has_no_time():
    ddp, fsdp = make(XL, T4, 1)[0], make(XL, T4, 2)[1]
    assert (ddp.micro_batch, ddp.time, ddp.tokens_per_s) == (0, None, 0)
    assert best([ddp]) is None
    assert best([ddp, fsdp]) is fsdp


def test_hours_and_dollars_follow_from_tokens_per_second():
    one = make(SMALL, H100, 8)[0]
    assert one.hours == pytest.approx(10e9 / one.tokens_per_s / 3600)
    assert one.dollars == pytest.approx(one.hours * 8 * 2)
    assert one.tokens_per_s == pytest.approx(512 * 1024 / one.time.total_s)
    assert one.efficiency == pytest.approx(1 - one.time.exposed_s / one.time.total_s)
    assert one.mfu < H100.mfu


def test_more_gpus_and_slower_links_lower_the_efficiency():
    few, many = (make(SMALL, H100, gpus)[0].efficiency for gpus in (8, 64))
    slow = make(SMALL, H100, 64, names=["ethernet-10"])[0].efficiency
    assert few > many > slow
    assert slow < 0.2


def test_one_gpu_has_nothing_to_shard():
    (only,) = make(SMALL, H100, 1)
    assert only.strategy == "ddp"
    assert only.efficiency == 1


def test_ddp_is_preferred_unless_fsdp_is_clearly_faster():
    memory = memory_per_device(SMALL, "ddp", 8, 1)
    ddp, fsdp = (Plan(strategy, False, 1, 1, memory, None, tokens_per_s=100) for strategy in ("ddp", "fsdp"))
    assert best([ddp, replace(fsdp, tokens_per_s=101)]) is ddp
    assert best([ddp, replace(fsdp, tokens_per_s=110)]).strategy == "fsdp"


def test_gpus_that_do_not_divide_the_batch_are_refused_with_what_they_would_divide():
    cluster = build_cluster(H100, 48)
    with pytest.raises(UserError, match=r"48 GPUs do not divide a batch of 512 sequences; .* such as 480 or 528"):
        plan(XL, H100, cluster, strategy="ddp", flops_per_s=1e14, dollars_per_hour=1)
    with pytest.raises(UserError, match=r"such as 1,024$"):
        plan(
            replace(XL, batch_size=1000),
            H100,
            build_cluster(H100, 1024),
            strategy="ddp",
            flops_per_s=1,
            dollars_per_hour=1,
        )


@pytest.mark.parametrize(
    ("preset", "gpu", "gpus"),
    [
        ("gpt2-medium-8gpu", H100, 8),
        ("gpt2-large-8gpu", H100, 8),
        ("gpt2-xl-8gpu", H100, 8),
        ("kaggle-2xt4", T4, 2),
    ],
)
def test_the_presets_for_several_gpus_divide_their_batch_and_fit(preset, gpu, gpus):
    params = YAML(typ="safe", pure=True).load(ROOT / f"presets/{preset}.yaml")
    train = params["train"]
    share = TrainConfig(**train).share(gpus)
    assert share.batch_size == train["batch_size"]  # on one GPU the same micro-batch, more often
    steps, length = train["gradient_accumulation_steps"], train["sequence_length"]
    run = Run(GPTConfig(**params["model"]), train["batch_size"] * steps, length, 1e9, train["optimizer"])
    needed = memory_per_device(run, "ddp", gpus, share.batch_size)
    assert needed.total <= gpu.memory_bytes
