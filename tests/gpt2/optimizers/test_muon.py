import pytest
import torch

from gpt2.optimizers.muon import MOMENTUM, Muon, orthogonalize
from gpt2.optimizers.optimizer import Optimizer


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.35), (torch.bfloat16, 0.4)])
def test_the_singular_values_of_an_update_are_near_one(shape, dtype, tolerance):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 100
    before = matrix.clone()
    update = orthogonalize(matrix, dtype)
    assert (update.dtype, update.shape) == (dtype, matrix.shape)
    assert torch.equal(matrix, before)
    values = torch.linalg.svdvals(update.float())
    assert ((values - 1).abs() < tolerance).sum() >= len(values) - 1  # the smallest of a square one may be tiny


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("shape", [(32, 96), (128, 32)])
def test_the_iteration_on_the_gram_matrix_gives_the_same_update(shape, rank):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + 1e-4 * torch.randn(shape)
    # in fp64 and bf16, each iteration multiplies the whole matrix
    expected = orthogonalize(matrix, torch.float64)
    torch.testing.assert_close(orthogonalize(matrix, torch.float32).double(), expected, rtol=0, atol=1e-3)


def test_a_step_equals_that_of_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4, 8))] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.data.copy_(mine)
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon(ours, dtype=torch.bfloat16, **options), torch.optim.Muon(theirs, momentum=MOMENTUM, **options)]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_orthogonalizes_in_bf16_where_the_matrix_products_do(tiny_model, train_config, dtype):
    muon = Optimizer(tiny_model, train_config(optimizer="muon"), dtype=dtype).parts["muon"]
    assert muon.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
