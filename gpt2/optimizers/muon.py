"""Muon (https://kellerjordan.github.io/posts/muon/), in the dtype that the machine is fast in.

`torch.optim.Muon` orthogonalizes in bf16 everywhere. A CPU without bf16 instructions takes many times as long for that
as for the whole rest of a step.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gpt2.world import local_part

MOMENTUM = 0.9
"""Lower than 0.95, its author's: better in runs of 120 steps (reports/benchmarks/ablations.md)."""
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
"""Of x, x^3 and x^5 in each iteration: those of Muon's author."""
EPS = 1e-7


def orthogonalize(
    matrix: Tensor, dtype: torch.dtype, coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS
) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: its singular values are about 0.7 to 1.2.

    A Newton-Schulz iteration of degree five. matrix: (rows, columns). dtype: of the products, and of the result.
    """
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    if is_tall:
        x = x.T
    x.div_(x.norm().clamp(min=EPS))  # so that no singular value is over 1
    iterate = _iterate_on_gram if dtype == torch.float32 and x.size(0) < x.size(1) else _iterate
    x = iterate(x, coefficients)
    return x.T if is_tall else x


def _iterate(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_on_gram(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The same with products of (rows, rows) only, but for the first and the last: 0.6 of the FLOPs in GPT-2.

    Each iteration multiplies x by a polynomial of its Gram matrix, so the Gram matrix of the result is known without
    the result. Not in bf16, whose rounding errors grow with each of these products.
    """
    gram, factor, product = x @ x.T, None, None
    for a, b, c in coefficients:
        if factor is not None:
            gram = gram @ (factor @ factor)
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
    return x if product is None else product @ x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, whose updates of matrices are orthogonalized.

    The learning rate of a matrix is scaled by sqrt(max(1, rows / columns)). Weight decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = MOMENTUM,
    ) -> None:
        """params: matrices. dtype: of the orthogonalization. momentum: of the gradients."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.momentum = dtype, momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = self.updates(parameters, [self._momentum(p) for p in parameters])
            for parameter, update in zip(parameters, updates, strict=True):
                part = local_part(parameter)
                self.decay(part, update, group["lr"] * group["weight_decay"])
                rows, columns = parameter.shape
                part.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def updates(self, parameters: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """The orthogonalized updates of parameters, of this process's part, given those before orthogonalization."""
        return [orthogonalize(part, self.dtype) for part in parts]

    def decay(self, part: Tensor, update: Tensor, share: float) -> None:
        """Makes the weights of this process's part smaller by a share."""
        part.mul_(1 - share)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The gradient with Nesterov's momentum, of this process's part."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer, gradient = local_part(state["momentum_buffer"]), local_part(parameter.grad)
        buffer.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum)
