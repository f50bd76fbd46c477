"""The model in several processes: replicated (DDP), or sharded (FSDP2).

ddp: each process has all weights, gradients and optimizer state. Gradients are averaged during the last backward pass.
fsdp: each has a part of them. The weights of a block are gathered for each of its passes, and its gradients averaged
after each backward pass.

DDP: https://arxiv.org/abs/2006.15704. FSDP: https://arxiv.org/abs/2304.11277.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt2.model.transformer import GPT
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import Weights
from gpt2.world import World, full_tensor


class _DistributedModel(MixedPrecisionModel):
    """What both strategies share: the loss is the forward pass of a module that torch wraps, `self._module`."""

    _module: nn.Module

    def warm_up(self, batch_size: int, sequence_length: int) -> None:
        """Runs the passes of one micro-batch, without an effect on weights, so that all later ones communicate alike.

        DDP assigns gradients to its buckets anew after its first backward pass, in the order in which they came. The
        sums of more than two processes depend on that; a run that resumes would begin with other sums.
        """
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=self.device)
        self.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        self.zero_grad()

    def _loss(self, inputs: Tensor, targets: Tensor, label_smoothing: float, compiled: bool) -> Tensor:
        return cast(Tensor, self._module(inputs, targets, label_smoothing, compiled))

    def _forward(self, *arguments: Any) -> Tensor:
        return super()._loss(*arguments)


class _Loss(nn.Module):
    """A model and its loss as one module. DDP and FSDP act at its forward pass, on the model's parameters."""

    def __init__(self, model: GPT, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *arguments: Any) -> Tensor:
        return self.loss(*arguments)


class DataParallelModel(_DistributedModel):
    """All weights in each process. Gradients become those of the global batch during the last backward pass."""

    def __init__(self, master: GPT, dtype: torch.dtype, world: World, **options: Any) -> None:
        """options: those of MixedPrecisionModel."""
        self._slots: list[tuple[nn.Module, str, Tensor]] = []
        self._buckets: dict[Tensor, Tensor] = {}
        super().__init__(master, dtype, **options)
        self.processes = world.size
        self._module = DistributedDataParallel(_Loss(master, self._forward), gradient_as_bucket_view=True)
        self._module.register_comm_hook(None, _sum)

    def warm_up(self, batch_size: int, sequence_length: int) -> None:
        """Also finds the places of gradients in DDP's buckets, to write them there at once."""
        super().warm_up(batch_size, sequence_length)
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=self.device)
        self.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        self._buckets = {master: master.grad for master, _ in self._pairs if master.grad is not None}
        self.zero_grad()

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch communicates, with the sums of all."""
        return nullcontext() if is_last else cast(DistributedDataParallel, self._module).no_sync()

    def _connect_gradients(self) -> None:
        """Replaces the parameters of the compute copy by tensors that pass their gradients on to the master weights.

        DDP waits until autograd has reached the master weights, and then reads their gradients.
        """
        copies = {id(copy) for _, copy in self._pairs}
        for module in self.compute.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in copies:
                    del module._parameters[name]
                    self._slots.append((module, name, parameter))

    def _forward(self, *arguments: Any) -> Tensor:
        weights = {id(copy): _Cast.apply(master, copy, self._accumulate) for master, copy in self._pairs}  # type: ignore[no-untyped-call]
        for module, name, copy in self._slots:
            setattr(module, name, weights[id(copy)])
        loss = super()._forward(*arguments)
        return cast(Tensor, _DivideGradient.apply(loss, self.processes))  # type: ignore[no-untyped-call]

    def _accumulate(self, master: Tensor, gradient: Tensor) -> None:
        """Adds a gradient of the compute copy to the fp32 gradient of a master weight."""
        if master.grad is not None:
            self._add(master.grad.view(-1), gradient.view(-1))
        elif master in self._buckets:
            master.grad = self._buckets[master].copy_(gradient)
        else:
            master.grad = gradient.to(master.dtype)


def _sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """The sum of a bucket over all processes; the loss is divided by their number already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class _Cast(torch.autograd.Function):
    """Forward: the copy of a master weight, which is cast already. Backward: accumulates the gradient of both."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor, accumulate: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.master, ctx.accumulate = master, accumulate
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.accumulate(ctx.master, gradient)
        return None, None, None  # autograd reaches the master weight all the same, without adding to its gradient


class _DivideGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / ctx.divisor, None


class FullyShardedModel(_DistributedModel):
    """A part of the weights, gradients and optimizer state in each process; master and compute copy are one model.

    The weights of a block are gathered in the compute dtype before it computes, and dropped afterwards. LayerNorm's are
    among them: they are rounded, which they are not in the other models. After each backward pass of a micro-batch the
    gradients are averaged in fp32; whole gradients are never stored.
    """

    def __init__(self, master: GPT, dtype: torch.dtype, world: World, **options: Any) -> None:
        """options: those of MixedPrecisionModel."""
        super().__init__(master, torch.float32, **options)
        self.dtype = dtype
        self.processes = world.size
        mesh = init_device_mesh(master.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the residual stream is fp32
        )
        for block in cast(nn.ModuleList, master.transformer["h"]):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._module = _Loss(master, self._forward)
        fully_shard(self._module, mesh=mesh, mp_policy=policy)

    def _loss(self, *arguments: Any) -> Tensor:
        loss = super()._loss(*arguments)
        if not torch.is_grad_enabled():  # without a backward pass, embeddings would stay gathered, in the compute dtype
            cast(FSDPModule, self._module).reshard()
        return loss

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their norm, over all processes, is at most max_norm. Returns the norm before."""
        return full_tensor(super().clip_grad_norm(max_norm))

    def copy_weights(self) -> Weights:
        """A copy of this process's part of all weights."""
        return {name: parameter.detach().clone() for name, parameter in self.master.named_parameters()}
