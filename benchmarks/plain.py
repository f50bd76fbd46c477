"""Plain GPT-2 training with standard PyTorch modules: the baseline and the nanoGPT-style peers of the benchmarks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import GPTConfig

Batch = tuple[Tensor, Tensor]


class PlainBlock(nn.Module):
    """A transformer block of PyTorch's own modules."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        B, T, C = x.size()
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x + mlp


class PlainGPT(nn.Module):
    """A GPT-2 that computes all logits at once, then their loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def plain_step(
    loss: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    batches: list[Batch],
    precision: torch.dtype,
    device: torch.device,
) -> Callable[[], None]:
    """A standard optimizer step: autocast, gradient accumulation, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)

    def step() -> None:
        for inputs, targets in batches:
            with autocast:
                value = loss(inputs, targets) / len(batches)
            value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def products_alone(
    config: GPTConfig, batch_size: int, sequence_length: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The matrix products of a micro-batch, forward and backward, as `nn.Linear` and attention compute them."""
    tokens, C, T = batch_size * sequence_length, config.n_embd, sequence_length

    def linear(n: int, k: int) -> list[Callable[[], object]]:
        x, w, g = (torch.randn(shape, device=device).to(dtype) for shape in ((tokens, k), (n, k), (tokens, n)))
        return [lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x]

    heads, size = batch_size * config.n_head, config.head_size
    q, s = (torch.randn(heads, T, last, device=device).to(dtype) for last in (size, T))
    attention: list[Callable[[], object]] = [
        lambda: q @ q.transpose(1, 2),
        lambda: s @ q,
        lambda: s.transpose(1, 2) @ q,
    ]
    for _ in range(config.n_layer):
        for n, k in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
            yield from linear(n, k)
        yield from (product for product in attention for _ in range(2))
    yield from linear(config.vocab_size, C)
