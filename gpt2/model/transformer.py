"""GPT-2 (Radford et al., 2019): attention, MLP, block, model.

Names of sizes:  B batch, T tokens in a sequence, C width (n_embd), V vocabulary.
The weights carry OpenAI's names (`transformer.h.0.attn.c_attn.weight`), so that checkpoints can be exchanged. Their
layout is that of `nn.Linear`; OpenAI's and Hugging Face's are transposed (see `gpt2.model.hugging_face`).
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.config import GPTConfig
from gpt2.model.attention import causal_attention, drop, within_documents

INIT_STD = 0.02


class LayerCache(Protocol):
    """The KV cache of one layer during generation (`gpt2.inference.kv_cache`)."""

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention of new tokens to themselves and to the cached ones.

        qkv: queries, keys and values, (3, B, n_head, T, head_size). Returns (B, n_head, T, head_size).
        """


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, which is fp32; sharded weights arrive in the dtype of the products."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (https://arxiv.org/abs/1606.08415)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # 0.5 (1 + tanh(u)) is sigmoid(2u), which takes a third of the time when compiled for a CPU
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, visible: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is None:
            q, k, v = qkv.unbind(0)  # (B, n_head, T, head_size)
            y = causal_attention(q, k, v, visible, dropout)
        else:
            y = cache.attend(qkv)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return cast(Tensor, self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a hidden width of 4 C, and the tanh approximation of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return cast(Tensor, self.c_proj(gelu_tanh(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        visible: Tensor | None = None,
        dropout: float = 0.0,
        *,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """(B, T, C) to (B, T, C). gradient_checkpointing: whether to compute all of it again in the backward pass."""
        if gradient_checkpointing:
            return cast(Tensor, checkpoint(self._residual, x, None, visible, dropout, use_reentrant=False))
        return self._residual(x, cache, visible, dropout)

    def _residual(self, x: Tensor, cache: LayerCache | None, visible: Tensor | None, dropout: float) -> Tensor:
        x = x + drop(self.attn(self.ln_1(x), cache, visible, dropout), dropout)
        return x + drop(self.mlp(self.ln_2(x)), dropout)


class GPT(nn.Module):
    """The language model; its input embedding and its output head are one matrix.

    mask_documents: whether attention stops at the borders of documents, where no KV cache is used.
    dropout: probability that GPT-2 drops an element of the embeddings, of the attention probabilities, and of what
    attention and MLP add to the residual stream. Only in passes that compute gradients.
    gradient_checkpointing: whether the inside of each block is recomputed in the backward pass.
    """

    def __init__(self, config: GPTConfig | dict[str, Any]) -> None:
        """A freshly initialised model of these sizes, given as a GPTConfig or a dict of its five keys."""
        super().__init__()
        self.config = config if isinstance(config, GPTConfig) else GPTConfig.from_dict(config)
        config = self.config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight  # tied
        self.mask_documents = False
        self.dropout = 0.0
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises all weights, with torch's global generator.

        | parameter                                   | value                               |
        |---------------------------------------------|-------------------------------------|
        | wte (= lm_head), wpe, c_attn, c_fc          | normal, std 0.02                    |
        | attn.c_proj, mlp.c_proj (into the residual) | normal, std 0.02 * (2 n_layer)^-0.5 |
        | biases                                      | 0                                   |
        | LayerNorm weights                           | 1                                   |

        The residual stream is a sum of 2 * n_layer contributions; the smaller std keeps its variance independent of the
        depth (Radford et al., 2019, section 2.3).
        """
        residual_std = INIT_STD * (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, residual_std)
            else:
                parameter.normal_(0.0, INIT_STD)

    def freeze(self, layers: int) -> None:
        """Keeps the embeddings, with the tied head, and so many first blocks as they are: no gradients for them.

        0 freezes nothing. To be called before compute copies and optimizers are made.
        """
        blocks = cast(nn.ModuleList, self.transformer["h"])[:layers]
        for module in (self.transformer["wte"], self.transformer["wpe"], *blocks) if layers else ():
            module.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(Tensor, self.transformer["wpe"].weight).device

    def compute_copy(self, dtype: torch.dtype) -> "GPT":
        """A copy in another dtype. It shares LayerNorm's parameters, which stay fp32."""
        shared = {id(p): p for name, p in self.named_parameters() if ".ln_" in name}
        model = copy.deepcopy(self, dict(shared))
        for parameter in model.parameters():
            if id(parameter) not in shared:
                parameter.data = parameter.data.to(dtype)
        return model

    def hidden(
        self, idx: Tensor, caches: Sequence[LayerCache] | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The last layer's output before the head, (B, T, C), for token ids idx, (B, T).

        caches: the KV cache of each layer, if idx follows cached tokens. positions: those of idx then, (B, T).
        Raises ValueError if the tokens do not fit the context.
        """
        return self.blocks(self.embed(idx, positions), caches, self.visible(idx) if caches is None else None)

    def embed(self, idx: Tensor, positions: Tensor | None = None) -> Tensor:
        """The embeddings of token ids idx, (B, T), at positions, (B, T), or from 0 on: (B, T, C), in fp32."""
        _, T = idx.size()
        if positions is None:
            if T > self.config.block_size:  # noqa: SIM300 - T is no constant
                raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
            positions = torch.arange(T, device=idx.device)
        # the residual stream is fp32, whatever the dtype of the matrix products
        return drop(self.transformer["wte"](idx).float() + self.transformer["wpe"](positions), self._dropout())

    def visible(self, idx: Tensor) -> Tensor | None:
        """Which tokens each token may attend to, for `blocks`; None is all earlier ones. idx: token ids, (B, T)."""
        return within_documents(idx) if self.mask_documents else None

    def blocks(self, x: Tensor, caches: Sequence[LayerCache] | None = None, visible: Tensor | None = None) -> Tensor:
        """All layers and the last LayerNorm, on embeddings x, (B, T, C)."""
        dropout = self._dropout()
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            cache = caches[layer] if caches is not None else None
            x = block(x, cache, visible, dropout, gradient_checkpointing=self.gradient_checkpointing)
        return cast(Tensor, self.transformer["ln_f"](x))

    def _dropout(self) -> float:
        return self.dropout if torch.is_grad_enabled() else 0.0

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, (B, T, V), and with targets, (B, T), the mean cross-entropy in nats per token."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))
