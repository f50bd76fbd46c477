import pytest
import torch

from gpt2 import device
from gpt2.device import autocast, choose_device, choose_precision
from gpt2.errors import UserError


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == chosen
    assert choose_device("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime\.device is 'cuda', but this machine"):
        choose_device("cuda")


@pytest.mark.parametrize(("bf16_s", "expected"), [(1.0, torch.bfloat16), (1.9, torch.float32), (4.0, torch.float32)])
def test_bf16_is_chosen_where_it_is_faster(monkeypatch, bf16_s, expected):
    monkeypatch.setattr(device, "_matmul_seconds", lambda dtype: bf16_s if dtype == torch.bfloat16 else 2.0)
    assert choose_precision(torch.device("cpu"), "auto") == expected
    assert choose_precision(torch.device("cpu"), "bf16") == torch.bfloat16
    assert choose_precision(torch.device("cpu"), "fp32") == torch.float32


def test_autocast_computes_in_the_precision():
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32
