import pytest
import torch

from gpt2 import device
from gpt2.device import choose_device, choose_precision, configure_device, device_name, peak_flops, peak_memory_bytes
from gpt2.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == chosen
    assert choose_device("cpu").type == "cpu"


def test_an_unavailable_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime\.device is 'cuda', which is not available"):
        choose_device("cuda")


@pytest.mark.parametrize(("bf16", "expected"), [(2.0, torch.bfloat16), (1.1, torch.float32), (0.5, torch.float32)])
def test_bf16_is_chosen_where_it_is_faster(monkeypatch, bf16, expected):
    monkeypatch.setattr(device, "matmul_flops", lambda _, dtype, *__: bf16 if dtype == torch.bfloat16 else 1.0)
    assert choose_precision(CPU, "auto") == expected
    assert choose_precision(CPU, "bf16") == torch.bfloat16
    assert choose_precision(CPU, "fp32") == torch.float32
    assert choose_precision(CPU, "fp16") == torch.float16


def test_small_products_detect_a_cpu_without_bf16(monkeypatch):
    sizes = []

    def flops(_, dtype, size, __):
        sizes.append(size)
        return 0.01 if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(device, "matmul_flops", flops)
    assert choose_precision(CPU, "auto") == torch.float32
    assert set(sizes) == {256}


def test_the_precision_is_chosen_by_the_time_of_one_thread(monkeypatch):
    """On a busy machine the wall clock tells another precision now and then, so that a run would not be repeatable."""
    found = []
    monkeypatch.setattr(
        device, "matmul_flops", lambda *arguments: found.append(torch.get_num_threads()) or arguments[3]()
    )
    monkeypatch.setattr(device.time, "thread_time", iter([2.0, 1.0, 3.0, 1.0]).__next__)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert choose_precision(CPU, "auto") == torch.bfloat16
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [1, 1, 1, 1]


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision(torch.device("cuda"), "auto") == expected


def test_the_peak_is_measured_once(monkeypatch, tmp_path):
    measured = iter([3e11, 5e11])
    monkeypatch.setattr(device, "matmul_flops", lambda *_: next(measured))
    cache = tmp_path / "peak.json"
    assert [peak_flops(CPU, torch.float32, cache) for _ in range(3)] == [3e11] * 3
    assert peak_flops(CPU, torch.bfloat16, cache) == 5e11
    assert peak_flops(CPU, torch.float32, cache) == 3e11
    assert device_name(CPU) in cache.read_text()


@pytest.mark.parametrize("damage", ["", "[]", '{"x": 1}', "\0"])
def test_a_damaged_cache_of_the_peak_is_measured_again(monkeypatch, tmp_path, damage):
    (tmp_path / "peak.json").write_text(damage)
    monkeypatch.setattr(device, "matmul_flops", lambda *_: 7e11)
    assert peak_flops(CPU, torch.float32, tmp_path / "peak.json") == 7e11


def test_a_product_is_timed():
    assert 1e6 < device.matmul_flops(CPU, torch.float32, 64) < 1e15


def test_peak_memory_is_measured_for_the_process():
    import psutil

    assert peak_memory_bytes(CPU) >= 0.9 * psutil.Process().memory_info().rss


def test_the_number_of_threads_is_set_or_left():
    before = torch.get_num_threads()
    try:
        configure_device(CPU, before + 1)
        configure_device(CPU)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
