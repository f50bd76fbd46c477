"""Muon in several processes: each orthogonalizes some of the matrices, and sends the results to the others."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2.optimizers.muon import Muon, orthogonalize
from gpt2.world import World


class DistributedMuon(Muon):
    """Muon, whose state it has and whose numbers it computes, with the orthogonalization divided.

    Whole matrices (DDP): the process of a matrix broadcasts its update. Sharded ones (FSDP): each process gets all
    parts of its matrix in an all-to-all exchange, and sends back the parts of its update. The exchange is that of Dion
    (https://arxiv.org/abs/2504.05295), in the dtype of the orthogonalization.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, world: World, **options: Any) -> None:
        super().__init__(params, **options)
        self.world = world

    def updates(self, parameters: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """The orthogonalized updates of parameters, of this process's part, given those before orthogonalization."""
        parts = [part.to(self.dtype) for part in parts]
        is_sharded = parameters and hasattr(parameters[0], "to_local")
        return self._exchange_parts(parameters, parts) if is_sharded else self._broadcast(parameters, parts)

    def _broadcast(self, parameters: list[Tensor], matrices: list[Tensor]) -> list[Tensor]:
        owners, pending = _owners([p.shape for p in parameters], self.world.size), []
        for index, owner in enumerate(owners):
            if owner == self.world.rank:
                matrices[index] = orthogonalize(matrices[index], self.dtype).contiguous()
            # as bytes: not every backend knows bf16
            pending.append(dist.broadcast(matrices[index].view(torch.uint8), src=owner, async_op=True))
        for work in pending:
            cast(dist.Work, work).wait()
        return matrices

    def _exchange_parts(self, parameters: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        size, rank = self.world.size, self.world.rank
        order = sorted(range(len(parameters)), key=lambda i: _cost(parameters[i].shape), reverse=True)
        updates = list(parts)
        for start in range(0, len(order), size):  # each process orthogonalizes one matrix at a time
            turn = order[start : start + size]
            mine = parameters[turn[rank]] if rank < len(turn) else None
            sent = [parts[i].numel() for i in turn] + [0] * (size - len(turn))
            rows = _rows(mine.shape[0], size) if mine is not None else [0] * size
            received = [count * (mine.shape[1] if mine is not None else 0) for count in rows]
            outgoing = torch.cat([parts[i].flatten() for i in turn])
            incoming = outgoing.new_empty(sum(received))
            _all_to_all(incoming, outgoing, received, sent)
            if mine is not None:
                incoming = orthogonalize(incoming.view(mine.shape), self.dtype).flatten()
            _all_to_all(outgoing, incoming, sent, received)
            for index, update in zip(turn, torch.split(outgoing, sent[: len(turn)]), strict=True):
                updates[index] = update.view(parts[index].shape)
        return updates


def _all_to_all(incoming: Tensor, outgoing: Tensor, received: list[int], sent: list[int]) -> None:
    # as bytes: not every backend knows bf16
    size = incoming.element_size()
    bytes_received, bytes_sent = [size * count for count in received], [size * count for count in sent]
    dist.all_to_all_single(incoming.view(torch.uint8), outgoing.view(torch.uint8), bytes_received, bytes_sent)


def _rows(count: int, size: int) -> list[int]:
    """Rows of a matrix in each process: those of torch.chunk, by which FSDP divides."""
    most = -(-count // size)
    return [max(0, min(most, count - rank * most)) for rank in range(size)]


def _cost(shape: torch.Size) -> int:
    """Multiplications of a Newton-Schulz iteration, up to a factor."""
    rows, columns = shape
    return rows * columns * min(rows, columns)


def _owners(shapes: list[torch.Size], size: int) -> list[int]:
    """The process of each matrix, so that all have about the same work."""
    owners, load = [0] * len(shapes), [0] * size
    for index in sorted(range(len(shapes)), key=lambda i: _cost(shapes[i]), reverse=True):
        owners[index] = load.index(min(load))
        load[owners[index]] += _cost(shapes[index])
    return owners
