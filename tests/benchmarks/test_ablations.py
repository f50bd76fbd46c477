import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ablations import BASE, CHANGES, MOMENTUM, POLAR_EXPRESS, StudiedMuon, difference, table
from benchmarks.learning import LastMean
from gpt2.optimizers.muon import Muon, orthogonalize


def weights_after(optimizer_type, **options):
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4, 8))]
    optimizer = optimizer_type(matrices, lr=0.02, weight_decay=0.1, dtype=torch.float32, **options)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        optimizer.step()
    return torch.cat([matrix.detach().flatten() for matrix in matrices])


def test_without_a_change_it_is_the_muon_of_the_project():
    assert torch.equal(weights_after(StudiedMuon), weights_after(Muon, momentum=MOMENTUM))


@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change.muon])
def test_each_change_of_muon_changes_the_weights(name):
    changed = weights_after(StudiedMuon, **CHANGES[name].muon)
    assert not torch.allclose(changed, weights_after(Muon, momentum=MOMENTUM), atol=1e-5)
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_polar_express_brings_the_singular_values_closer_to_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32, POLAR_EXPRESS))
    assert (values - 1).abs().max() < 0.15


def test_the_interval_is_that_of_the_differences_on_the_same_seeds():
    losses = {BASE: [5.0, 6.0, 7.0], "NorMuon": [4.9, 5.8, 6.7]}
    runs = [
        {"change": name, "seed": seed, "val_loss": loss}
        for name, of_name in losses.items()
        for seed, loss in enumerate(of_name)
    ]
    mean, width = difference(runs, "NorMuon")
    assert mean == pytest.approx(-0.2)
    assert width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert "| 3 | 5.800 | -0.200 (-0.448 to +0.048) |" in table(runs)
    assert difference(runs[:4], "NorMuon") == (pytest.approx(-0.1), math.inf)


def test_momentum_rises_in_the_warm_up():
    optimizer = StudiedMuon(
        [torch.nn.Parameter(torch.ones(2, 2))], warm_up_steps=2, lr=0.1, weight_decay=0.0, dtype=torch.float32
    )
    seen = []
    for _ in range(4):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
        optimizer.step()
        seen.append(optimizer.momentum)
    assert seen == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_the_mean_of_the_last_weights_is_in_place_only_while_it_is_used():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = SimpleNamespace(step=lambda: model.weight.data.add_(1))
    model.weight.data.zero_()
    mean = LastMean(SimpleNamespace(master=model, cast_weights=lambda: None), optimizer, first_step=3)
    for step in range(1, 6):
        optimizer.step()
        with mean.in_place():
            assert model.weight.item() == (step if step < 3 else (3 + step) / 2)
        assert model.weight.item() == step
