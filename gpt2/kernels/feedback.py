"""Rounding to 4 bits in which every input makes up for the rounding errors of the inputs before it.

A layer's outputs are off by (w - q) x, for rounded weights q. Inputs x are correlated, so that a later weight can
cancel much of the error of an earlier one. For example inputs X, (N, in) with a mean square of 1, this minimises

    |(w - q) X^T|^2 (1 - RIDGE) / N + |w - q|^2 RIDGE

greedily, input by input: each weight is rounded after it has been moved to where the error would be least if all later
weights were free. This is the method of GPTQ (https://arxiv.org/abs/2210.17323). There are fewer examples than inputs,
so instead of the matrix X^T X, (in, in), the output errors on the N examples are carried along.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
RIDGE = 0.2
"""Share of the plain squared error: what the examples do not show matters too. 0.1 and 0.4 are not better."""
STEP = 16  # inputs that are rounded at once: fewer are slower, more have a larger error
CHUNK_WEIGHTS = 1 << 21  # 8 MB in fp32; the temporaries take about four times that


@dataclass(frozen=True)
class _Group:
    """How a group of inputs is rounded. g: inputs in the group.

    inputs: (g, N). from_errors: what the errors so far, (N, out), move the weights by, (g, N). from_steps: for each
    step but the first, what the errors of the group's earlier inputs move its weights by, (STEP, earlier inputs).
    """

    inputs: Tensor
    from_errors: Tensor
    from_steps: list[Tensor]


def _plan(inputs: Tensor, group: int) -> list[_Group]:
    """The groups in the order of the inputs, for example inputs (N, in)."""
    x = inputs.float().T  # (in, N)
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)  # so that the squares do not overflow
    x = x * ((1 - RIDGE) / RIDGE / x.square().sum(1).mean().clamp(min=1e-30)).sqrt()
    # Later weights can cancel output errors except for the share that the inverse of `left` stands for, (N, N)
    left = torch.eye(x.size(1), device=x.device)
    factor = left
    groups = []
    for own in reversed(torch.split(x, group)):
        cost = torch.eye(group, device=x.device) + own @ torch.cholesky_solve(own.T, factor)
        upper = torch.linalg.cholesky(cost.flip(0, 1)).flip(0, 1)  # cost = upper upper^T
        from_steps = [
            torch.linalg.solve_triangular(upper[a : a + STEP, a : a + STEP].T, upper[:a, a : a + STEP].T, upper=False)
            for a in range(STEP, group, STEP)
        ]
        left = left + own.T @ own
        factor = torch.linalg.cholesky(left)
        groups.append(_Group(own, torch.cholesky_solve(own.T, factor).T.contiguous(), from_steps))
    return groups[::-1]


class FeedbackRounding:
    """Rounds the weights of a layer for example inputs."""

    def __init__(self, inputs: Tensor, group: int) -> None:
        """inputs: (N, in), finite. group: inputs that share a scale."""
        self.group, self.examples = group, len(inputs)
        self._groups = _plan(inputs, group)

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers from -8 to 7, (out, groups, group), and scales, (out, groups), of rows of the weight, of this shape.

        Each scale turns the weight of largest magnitude into -8. Other rows decide no more than ties.
        """
        largest = weight.abs().amax((1, 2))
        relative = weight / largest.masked_fill(largest == 0, 1.0)[:, None, None]
        w = relative.flatten(1).T.contiguous()  # (in, out), at most 1
        by_group = w.view(-1, self.group, w.size(1))
        highest, lowest = by_group.amax(1), by_group.amin(1)
        scales = torch.where(-lowest > highest, lowest, highest) / LOWEST  # (groups, out)
        numbers = torch.empty_like(w)
        errors = w.new_zeros(self.examples, w.size(1))  # of the outputs so far, for each example
        for i, (each, scale) in enumerate(zip(self._groups, scales, strict=True)):
            part = slice(i * self.group, (i + 1) * self.group)
            moved = torch.addmm(w[part], each.from_errors, errors)
            _round_group(moved, scale, each.from_steps, numbers[part])
            errors.addmm_(each.inputs.T, torch.addcmul(w[part], numbers[part], scale, value=-1))
        return numbers.T.reshape(weight.shape), (scales * largest).T


def _round_group(moved: Tensor, scale: Tensor, from_steps: list[Tensor], numbers: Tensor) -> None:
    """Writes the numbers of a group, (g, out). moved: its weights, (g, out). scale: (out,)."""
    divisor = scale.masked_fill(scale == 0, 1.0)
    errors = torch.empty_like(moved)
    for a in range(0, len(moved), STEP):
        step = slice(a, a + STEP)
        target = torch.addmm(moved[step], from_steps[a // STEP - 1], errors[:a]) if a else moved[step]
        torch.div(target, divisor, out=numbers[step]).round_().clamp_(LOWEST, HIGHEST)
        torch.addcmul(moved[step], numbers[step], scale, value=-1, out=errors[step])
