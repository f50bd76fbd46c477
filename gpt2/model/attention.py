"""Causal self-attention without a KV cache, by the fastest way for its device, dtype and length.

Names of sizes:  B batch, T tokens in a sequence, D head_size.
"""

from collections.abc import Iterator
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
    products take 0.4 to 0.9 of its time: all at once for short sequences, by tiles for others.
    """
    T, head_size = q.shape[2:]
    is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if is_slow and not dropout and T > SHORT_SEQUENCE:
        return cast(Tensor, tiled_attention(q, k, v, visible))
    is_short = is_slow and T <= SHORT_SEQUENCE
    if not is_short and (not dropout or q.device.type == "cuda"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=visible is None)
    scores = (q * head_size**-0.5) @ k.transpose(2, 3)  # (B, n_head, T, T)
    if visible is None:
        bias = torch.full((T, T), -torch.inf, device=q.device).triu(1)
    else:
        bias = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, -torch.inf)
    return drop((scores.float() + bias).softmax(3).to(v.dtype), dropout) @ v


@torch.library.custom_op("gpt2::tiled_attention", mutates_args=())
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Causal attention by tiles of queries, whose products leave out the keys that come after a tile.

    Like FlashAttention (https://arxiv.org/abs/2205.14135), it computes the probabilities again in the backward pass.
    Arguments as in `causal_attention`. Returns the attention, (B, n_head, T, D).
    """
    if torch.cpu._is_amx_tile_supported():  # PyTorch's forward pass is faster there; its backward pass is not
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
    out = torch.empty_like(q)
    scratch = _scratch(q)
    for b in range(len(q)):
        q_b, k_b, v_b = (x[b].contiguous() for x in (q, k, v))
        for tile, keys, probabilities, _ in _tiles(q_b, k_b, None if visible is None else visible[b, 0], scratch):
            torch.bmm(probabilities, v_b[:, keys], out=out[b, :, tile])
    return out


@torch.library.custom_op("gpt2::tiled_attention_backward", mutates_args=())
def _tiled_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, by tiles of queries. gradient: of the attention, (B, n_head, T, D)."""
    B, n_head, T, head_size = q.shape
    scale = head_size**-0.5
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    k_sum, v_sum, of_tile = torch.empty(3, n_head, T, head_size)  # sums in fp32, and what a tile adds
    rounded, scratch = q.new_empty(n_head * T * head_size), _scratch(q)
    for b in range(B):
        k_sum.zero_()
        v_sum.zero_()
        q_b, k_b, v_b, gradient_b = (x[b].contiguous() for x in (q, k, v, gradient))
        tiles = _tiles(q_b, k_b, None if visible is None else visible[b, 0], scratch)
        for tile, keys, probabilities, free in tiles:
            gradient_tile, part = gradient_b[:, tile], of_tile[:, keys]
            product = rounded[: part.numel()].view(part.shape)
            # to fp32 first: adding bf16 to fp32 is slow
            torch.bmm(probabilities.transpose(1, 2), gradient_tile, out=product)
            v_sum[:, keys] += part.copy_(product)
            scores_grad = torch.bmm(gradient_tile, v_b[:, keys].transpose(1, 2), out=free)
            torch._softmax_backward_data(scores_grad, probabilities, 2, q.dtype, grad_input=scores_grad)
            torch.bmm(scores_grad.transpose(1, 2), q_b[:, tile], out=product)
            k_sum[:, keys] += part.copy_(product)
            torch.bmm(scores_grad, k_b[:, keys], out=q_grad[b, :, tile])
        k_grad[b], v_grad[b] = k_sum.mul_(scale), v_sum
    return q_grad.mul_(scale), k_grad, v_grad


def _tiles(
    q: Tensor, k: Tensor, visible: Tensor | None, scratch: Tensor
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """For each tile of a sequence: its queries, their keys, the probabilities, and room for as many numbers.

    q, k: (n_head, T, D). visible: (T, T). Probabilities and room, (n_head, queries, keys), are those of one tile only.
    """
    n_head, T, head_size = q.shape
    q = q * head_size**-0.5
    future = torch.full((TILE, TILE), -torch.inf, dtype=q.dtype).triu(1)
    for start in range(0, T, TILE):
        end = min(start + TILE, T)
        tile, keys, size = slice(start, end), slice(0, end), end - start
        scores, free = (part[: n_head * size * end].view(n_head, size, end) for part in scratch)
        torch.bmm(q[:, tile], k[:, keys].transpose(1, 2), out=scores)
        if visible is None:
            scores[:, :, tile] += future[:size, :size]
        else:
            scores.masked_fill_(~visible[tile, keys], -torch.inf)
        yield tile, keys, torch.softmax(scores, 2, out=scores), free


def _scratch(q: Tensor) -> Tensor:
    """Room for the probabilities of the largest tile, and their gradient."""
    _, n_head, T, _ = q.shape
    return q.new_empty(2, n_head * min(TILE, T) * T)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    return torch.empty_like(q)


@_tiled_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))


def _remember(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_tiled_attention_backward(*ctx.saved_tensors, gradient), None


tiled_attention.register_autograd(_backward, setup_context=_remember)
