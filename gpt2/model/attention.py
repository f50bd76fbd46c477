"""Causal self-attention without a KV cache, by the fastest way for its device, dtype and length.

Names of sizes:  B batch, T tokens in a sequence, D head_size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import END_OF_TEXT

SHORT_SEQUENCE = 256
"""Tokens up to which training in bf16 on a CPU keeps all probabilities instead of computing them again."""
TILE = 256
"""Tokens in a tile of `tiled_attention`."""


def within_documents(idx: Tensor) -> Tensor:
    """Which tokens a token may attend to, if not to those of other documents: itself, and earlier ones of its own.

    `<|endoftext|>` is the first token of the document that it begins. idx: token ids, (B, T). Returns (B, 1, T, T),
    True for a query (third dimension) and a key (fourth) that it may attend to.
    """
    document = (idx == END_OF_TEXT).cumsum(1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def drop(x: Tensor, probability: float) -> Tensor:
    """Dropout (https://jmlr.org/papers/v15/srivastava14a.html); nothing is computed for a probability of 0."""
    return F.dropout(x, probability) if probability else x


def causal_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention of each token to itself and to earlier tokens; all (B, n_head, T, D).

    visible: which of these, from `within_documents`; None is all. dropout: of the attention probabilities. Uses
    PyTorch's kernel, with two exceptions. Outside CUDA it has no dropout. And to train in bf16 on a CPU, matrix
    products take 0.4 to 0.6 of its time: all at once for short sequences, by tiles for others where they are compiled.
    """
    T, head_size = q.shape[2:]
    is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if is_slow and not dropout and T > SHORT_SEQUENCE and torch.compiler.is_compiling():
        y, _ = tiled_attention(q, k, v, visible)
        return cast(Tensor, y)
    is_short = is_slow and T <= SHORT_SEQUENCE
    if not is_short and (not dropout or q.device.type == "cuda"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None)
    scores = (q * head_size**-0.5) @ k.transpose(2, 3)  # (B, n_head, T, T)
    bias = _bias(visible, slice(0, T), slice(0, T), q.device)
    return drop((scores.float() + bias).softmax(3).to(v.dtype), dropout) @ v


def _bias(visible: Tensor | None, queries: slice, keys: slice, device: torch.device) -> Tensor:
    """What to add to their scores: 0 for what is visible, otherwise -inf. (..., queries, keys), in fp32."""
    if visible is None:
        all_hidden = torch.full((queries.stop - queries.start, keys.stop - keys.start), -torch.inf, device=device)
        return all_hidden.triu(1 + queries.start - keys.start)
    part = visible[..., queries, keys]
    return torch.zeros(part.shape, device=device).masked_fill(~part, -torch.inf)


@torch.library.custom_op("gpt2::tiled_attention", mutates_args=())
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention by tiles of queries, whose products leave out the keys that come after a tile.

    Like FlashAttention (https://arxiv.org/abs/2205.14135), it stores the logarithm of each softmax's denominator, and
    computes the probabilities again in the backward pass. Arguments as in `causal_attention`. Returns the attention,
    (B, n_head, T, D), and these logarithms, (B, n_head, T, 1), in fp32. It compiles its kernels.
    """
    out, log_sum = _results(q)
    T, head_size = q.shape[2:]
    q, k, v = (q * head_size**-0.5).contiguous(), k.contiguous(), v.contiguous()
    softmax = _compiled(_softmax)
    for start in reversed(range(0, T, TILE)):  # the largest first, whose kernel is not one of a special case
        queries = slice(start, min(start + TILE, T))
        keys = slice(0, queries.stop)
        scores = q[:, :, queries] @ k[:, :, keys].transpose(2, 3)
        weights, scale, log_sum[:, :, queries] = softmax(scores, _bias(visible, queries, keys, q.device))
        torch.mul(weights @ v[:, :, keys], scale, out=out[:, :, queries])
    return out, log_sum


@torch.library.custom_op("gpt2::tiled_attention_backward", mutates_args=())
def _tiled_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, out: Tensor, log_sum: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, by tiles of keys. gradient: of `out`, (B, n_head, T, D)."""
    T, head_size = q.shape[2:]
    scale = head_size**-0.5
    q, k, v, gradient = (q * scale).contiguous(), k.contiguous(), v.contiguous(), gradient.contiguous()
    softmax_backward = _compiled(_softmax_backward)
    mean = (gradient.float() * out.float()).sum(3, keepdim=True)  # of the probabilities' gradient, in each softmax
    q_grad = torch.zeros_like(q, dtype=torch.float32)
    k_grad, v_grad = torch.empty_like(k), torch.empty_like(v)
    for start in range(0, T, TILE):
        keys, queries = slice(start, min(start + TILE, T)), slice(start, T)
        q_part, k_part, gradient_part = q[:, :, queries], k[:, :, keys], gradient[:, :, queries]
        probabilities, scores_grad = softmax_backward(
            q_part @ k_part.transpose(2, 3),
            gradient_part @ v[:, :, keys].transpose(2, 3),
            _bias(visible, queries, keys, q.device),
            # copies, not views: each other offset would be another kernel
            log_sum[:, :, queries].clone(),
            mean[:, :, queries].clone(),
        )
        v_grad[:, :, keys] = probabilities.transpose(2, 3) @ gradient_part
        k_grad[:, :, keys] = scores_grad.transpose(2, 3) @ q_part
        q_grad[:, :, queries] += scores_grad @ k_part
    return (q_grad * scale).to(q.dtype), k_grad, v_grad


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the results of `tiled_attention`; those of all heads of a token are next to each other."""
    B, n_head, T, head_size = q.shape
    out = q.new_empty(B, T, n_head, head_size).transpose(1, 2)
    return out, q.new_empty(B, n_head, T, 1, dtype=torch.float32)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    return _results(q)


@_tiled_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))


def _remember(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_tiled_attention_backward(*ctx.saved_tensors, gradient), None


tiled_attention.register_autograd(_backward, setup_context=_remember)


def _softmax(scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of scores in their dtype, not yet divided by its sum; 1 / the sum; the logarithm of exp(scores)'s sum."""
    biased = scores.float() + bias
    largest = biased.amax(3, keepdim=True)
    weights = torch.exp(biased - largest).to(scores.dtype)
    total = weights.float().sum(3, keepdim=True)
    return weights, 1 / total, largest + torch.log(total)


def _softmax_backward(
    scores: Tensor, probabilities_grad: Tensor, bias: Tensor, log_sum: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities, and the gradient of the scores."""
    probabilities = torch.exp(scores.float() + bias - log_sum).to(scores.dtype)
    return probabilities, (probabilities.float() * (probabilities_grad.float() - mean)).to(scores.dtype)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)
