"""Muon (https://kellerjordan.github.io/posts/muon/), in the dtype that the machine is fast in.

`torch.optim.Muon` orthogonalizes in bf16 everywhere. A CPU without bf16 instructions takes many times as long for that
as for the whole rest of a step.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gpt2.world import local_part

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: its singular values are about 0.7 to 1.2.

    A Newton-Schulz iteration of degree five, with the coefficients of Muon's author. matrix: (rows, columns). dtype: of
    the products, and of the result.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    if is_tall:
        x = x.T
    x.div_(x.norm().clamp(min=EPS))  # so that no singular value is over 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


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
        """params: matrices. dtype: of the orthogonalization. momentum: that of the author."""
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
