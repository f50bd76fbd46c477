"""Fused linear cross-entropy: the head and its loss, in chunks of tokens.

GPT-2's head computes 50,257 logits per token, so the logits of a whole batch would be the largest tensor of a step by
far. Here they exist for `CHUNK_TOKENS` tokens at a time, and their gradient overwrites them.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

CHUNK_TOKENS = 512
ALIGNMENT = 64


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    shared: int = 1,
    compiled: bool = False,
) -> Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`, in fp32. Differentiable in hidden and weight.

    hidden: (N, C). weight: (V, C). targets: token ids, (N,). label_smoothing: fraction of each target's probability
    that is spread over all tokens (https://arxiv.org/abs/1512.00567). shared: number of tokens that share the last row
    of the weight (`gpt2.training.vocabulary`); not with label smoothing. compiled: whether to compile the kernels.
    """
    arguments = (hidden, weight, targets, label_smoothing, shared, compiled)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return cast(Tensor, _LinearCrossEntropy.apply(*arguments))  # type: ignore[no-untyped-call]
    loss, _, _ = _loss_and_gradients(*arguments, with_gradients=False)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, *gradients = _loss_and_gradients(
            *arguments, with_gradients=True, with_weight_gradient=ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            hidden_grad.mul_(scale / len(hidden_grad)),
            weight_grad.mul_(scale) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    shared: int,
    compiled: bool,
    *,
    with_gradients: bool,
    with_weight_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, N times its gradient with respect to hidden, and that with respect to weight.

    Gradients are empty if not requested. That of hidden is divided by N after the scale of the loss is multiplied in:
    in fp16 it would be too small before.

    with_gradients: that of hidden. with_weight_gradient: that of a weight that is trained, too.
    """
    (N, C), V = hidden.shape, len(weight)
    log_sum_exp, exponentials, normalised, add, transposed = map(_compiled, KERNELS) if compiled else KERNELS
    total = torch.zeros((), device=hidden.device)
    hidden_grad = torch.empty_like(hidden if with_gradients else hidden[:0])
    in_place = weight.dtype == torch.float32  # a product in fp32 adds to the sum by itself
    # otherwise transposed, (C, V): that product is faster
    shape = ((V, C) if in_place else (C, V)) if with_weight_gradient else (0, 0)
    weight_grad = hidden.new_empty(shape, dtype=torch.float32)
    # on a CPU, products are a third faster if rows start at multiples of 64 elements; they read the padding between
    # rows too, and multiply it by 0, so it must not be NaN
    buffer = hidden.new_zeros(min(N, CHUNK_TOKENS), V + -V % ALIGNMENT)[:, :V]
    part = torch.empty_like(weight_grad[:0] if in_place else weight_grad, dtype=weight.dtype)
    # exp(logits) are up to V times as large as the probabilities, and their factors smaller: too small for fp16
    divides = bool(label_smoothing) or hidden.dtype == torch.float16
    for start in range(0, N, CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        h, t = hidden[chunk], targets[chunk]
        rows = torch.arange(len(t), device=t.device)
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])  # (n, V)
        if shared > 1:  # the last logit is that of all tokens of the row, and a target is one of them
            logits[:, -1] += math.log(shared)
            total += math.log(shared) * (t == V - 1).sum()
        at_target = logits[rows, t].float()
        if label_smoothing:
            total += label_smoothing * (at_target - logits.mean(dim=1, dtype=torch.float32)).sum()
        if not with_gradients:
            total += (log_sum_exp(logits) - at_target).sum()
            continue
        # the gradient of a token's logits is factor * (exp(logits) - sum * target distribution); at the target it is
        # computed in fp32. So exp is computed once, and the factor is left to the smaller tensors
        largest, sums = exponentials(logits)  # (n,)
        total += (largest + torch.log(sums) - at_target).sum()
        at_target = torch.exp(at_target - largest)
        if divides:
            normalised(logits, sums, label_smoothing / V)
            at_target = at_target / sums - label_smoothing / V - (1 - label_smoothing)
            sums = torch.ones_like(sums)
        else:
            at_target -= sums
        logits[rows, t] = at_target.to(logits.dtype)
        torch.mm(logits, weight, out=hidden_grad[chunk]).div_(sums[:, None])
        if not with_weight_gradient:
            continue
        h = (h / (N * sums[:, None])).to(h.dtype)
        if in_place:
            torch.addmm(weight_grad, logits.t(), h, beta=float(start > 0), out=weight_grad)
        elif start == 0:
            weight_grad.copy_(torch.mm(h.t().contiguous(), logits, out=part))
        else:
            add(weight_grad, torch.mm(h.t().contiguous(), logits, out=part))
    return total / N, hidden_grad, weight_grad if in_place else transposed(weight_grad, weight.dtype)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """(n, V) to (n,), in fp32."""
    return torch.logsumexp(logits.float(), dim=1)


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - largest) of logits, (n, V), in place; the largest of each row and the sum of the results, in fp32.

    What is summed is rounded as the results are: compiled, rounding takes a third of the time of keeping both.
    """
    largest = logits.float().amax(1)
    exponentials = torch.exp(logits.float() - largest[:, None]).to(logits.dtype)
    logits.copy_(exponentials)
    return largest, exponentials.float().sum(1)


def _normalised_(exponentials: Tensor, sums: Tensor, less: float) -> Tensor:
    """exponentials / sums - less, (n, V), in place."""
    return exponentials.copy_(exponentials.float() / sums[:, None] - less)


def _add_(total: Tensor, part: Tensor) -> Tensor:
    """Adds a bf16 or fp16 tensor to an fp32 one."""
    return total.add_(part)


def _transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous transpose."""
    return matrix.t().to(dtype).contiguous()


KERNELS = (_log_sum_exp, _exp_, _normalised_, _add_, _transposed)


@cache
def _compiled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(kernel, dynamic=False)
