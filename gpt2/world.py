"""The processes of a training run.

The loop asks a `World`. With one process, which is the plain case, all answers are its own, and nothing communicates.
`torchrun` (https://docs.pytorch.org/docs/stable/elastic/run.html) starts the processes and tells each its rank.
"""

import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from gpt2.errors import UnreachableError, one_line

TIMEOUT_S = 600
"""A collective that takes longer fails: a process hangs, or its machine is gone."""
JOIN_TIMEOUT_S = 300
"""Processes start within this time: some read their files from a slow disk."""
TIMEOUT_VARIABLE = "GPT2_COLLECTIVE_TIMEOUT_S"
"""Environment variable with another timeout, in seconds."""


@dataclass(frozen=True)
class World:
    """A process among those that train together.

    rank: its number, from 0. size: how many there are. local_rank, local_size: the same on its machine. store: a
    key-value store that all processes share, which works while collectives do not. All methods are collectives: each
    process calls them in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = None

    @property
    def name(self) -> str:
        """This process, for messages."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def threads(self) -> int | None:
        """CPU threads of this process, if it shares the cores of its machine with others; None is torch's default."""
        if self.size == 1:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor.item())

    def sum(self, value: float) -> float:
        """The sum over all processes, in double precision."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item()

    def mean(self, value: float) -> float:
        """The mean over all processes, in double precision."""
        return self.sum(value) / self.size

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def max(self, value: int) -> int:
        """The largest value of all processes."""
        return max(int(each) for each in self.gather(value))

    def from_first(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


ALONE = World()
"""The only process of a run."""


def timeout_s() -> float:
    """Seconds after which a collective fails."""
    return float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT_S))


def join(device_type: str) -> World:
    """Meets the other processes that torchrun started. device_type: of the model.

    Raises UnreachableError if they do not all answer.
    """
    start, timeout = timedelta(seconds=JOIN_TIMEOUT_S), timedelta(seconds=timeout_s())
    # values that the processes agree on are on the CPU, so that a GPU need not wait for them
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=start)))
        store = PrefixStore(_meet(store, rank, size), store)
        shared = PrefixStore("endings", store)
        shared.set(f"host/{rank}", socket.gethostname())
        shared.wait([f"host/{other}" for other in range(size)], start)
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if device_type == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group(backend, store=PrefixStore("run", store), rank=rank, world_size=size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError, KeyError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UnreachableError(
            f"the other processes do not answer at {where} ({one_line(error, 150)}); check that all nodes run the same "
            "torchrun command and reach that address, and run it again"
        ) from None
    return World(rank, size, local_rank, local_size, shared)


def _meet(store: Any, rank: int, size: int) -> str:
    """A name that only these processes know.

    When torchrun starts processes again, they find what the earlier ones left in its store. So rank 0 makes a name, and
    takes note of who answers to it; the others look for a name that took note of them. Raises RuntimeError.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_TIMEOUT_S
    if rank == 0:
        store.set("name", me)
    while time.monotonic() < deadline:
        name = store.get("name").decode() if rank else me
        store.set(f"{name}/{rank}", me)
        if rank == 0 and store.check([f"{name}/{other}" for other in range(size)]):
            store.set(f"{name}/all", " ".join(store.get(f"{name}/{other}").decode() for other in range(size)))
        if store.check([f"{name}/all"]) and me in store.get(f"{name}/all").decode():
            return name
        time.sleep(0.05)
    raise RuntimeError(f"not all of {size} processes came within {JOIN_TIMEOUT_S} s")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor in this process; any other tensor as it is."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; any other tensor as it is. A collective."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
