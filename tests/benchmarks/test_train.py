import pytest
import torch

from benchmarks import train
from tests.conftest import TINY


@pytest.mark.parametrize("contender", [*train.OURS.values(), *train.PEERS.values()], ids=[*train.OURS, *train.PEERS])
def test_each_contender_runs_a_step(contender):
    batches = [tuple(torch.randint(0, TINY.vocab_size, (2, 16)) for _ in range(2))]
    step = train.make_step({**contender, "compile": False}, TINY, torch.float32, torch.device("cpu"), batches)
    step()
    step()
