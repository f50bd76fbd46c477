"""GPT-2 (Radford et al., 2019), to be read in one sitting: attention, MLP, block, model.

Names of sizes:  B batch, T tokens in a sequence, C width (n_embd), V vocabulary.
The weights carry OpenAI's names (`transformer.h.0.attn.c_attn.weight`), so that checkpoints can be exchanged. They lie
as `nn.Linear` has them; OpenAI's and Hugging Face's lie transposed (see `swap_conv1d_layout`).
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.config import PRESETS, GPTConfig
from gpt2.errors import UserError

__all__ = ["GPT", "GPTConfig", "LayerCache", "swap_conv1d_layout"]

INIT_STD = 0.02
SHORT_SEQUENCE = 256
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class LayerCache:
    """Keys and values of the tokens that one layer has seen, in buffers allocated once.

    keys, values: (B, n_head, capacity, head_size), of which the first `length` positions are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor) -> None:
        """Buffers for the whole context, of the device and type of `like`."""
        shape = (batch_size, config.n_head, config.block_size, config.head_size)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v, (B, n_head, T, head_size); gives all so far, (B, n_head, length, head_size)."""
        end = self.length + k.size(2)
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to itself and what came before; all (B, n_head, T, head_size).

    PyTorch's own, but where a CPU trains in bf16 on short sequences: there the backward pass of PyTorch's takes several
    times as long as plain matrix products (benchmarks/train.py).
    """
    T, head_size = q.shape[2:]
    is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT_SEQUENCE and q.requires_grad
    if not is_slow:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.full((T, T), -torch.inf, device=q.device).triu(1)
    scores = (q * head_size**-0.5) @ k.transpose(2, 3)  # (B, n_head, T, T)
    return cast(Tensor, (scores.float() + future).softmax(3).to(v.dtype) @ v)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (https://arxiv.org/abs/1606.08415)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # 0.5 (1 + tanh(u)) is sigmoid(2u), which compiled for a CPU takes a third of the time
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x.to(self.c_attn.weight.dtype)).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)  # (B, n_head, past + T, head_size)
        if past == 0:
            y = causal_attention(q, k, v)
        elif T == 1:  # the newest token sees all
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return cast(Tensor, self.c_proj(y))


class MLP(nn.Module):
    """Two layers, four times as wide between, with the tanh approximation of GELU that GPT-2 was trained with."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return cast(Tensor, self.c_proj(gelu_tanh(self.c_fc(x.to(self.c_fc.weight.dtype)))))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """The language model; its input embedding and its output head are one matrix."""

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
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight  # tied
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all weights anew, from torch's global generator.

        | parameter                                   | value                               |
        |---------------------------------------------|-------------------------------------|
        | wte (= lm_head), wpe, c_attn, c_fc          | normal, std 0.02                    |
        | attn.c_proj, mlp.c_proj (into the residual) | normal, std 0.02 * (2 n_layer)^-0.5 |
        | biases                                      | 0                                   |
        | LayerNorm weights                           | 1                                   |

        The residual stream adds up 2 * n_layer contributions; the smaller std keeps its variance independent of the
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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def new_cache(self, batch_size: int = 1) -> list[LayerCache]:
        """Empty key-value caches for `hidden`, one for each layer."""
        return [LayerCache(self.config, batch_size, self.lm_head.weight) for _ in range(self.config.n_layer)]

    def hidden(self, idx: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        """The last layer's output before the head, (B, T, C), for token ids idx, (B, T).

        With a cache, idx holds the tokens that follow those already in it, and is added to it.
        Raises ValueError if the tokens do not fit the context.
        """
        return self.blocks(self.embed(idx, cache[0].length if cache is not None else 0), cache)

    def embed(self, idx: Tensor, past: int = 0) -> Tensor:
        """The embeddings of token ids idx, (B, T), that follow `past` others: (B, T, C), in fp32."""
        _, T = idx.size()
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit the context of {self.config.block_size}")
        positions = torch.arange(past, past + T, device=idx.device)
        # the residual stream is fp32 in whatever format the matrix products are
        return cast(Tensor, self.transformer["wte"](idx).float() + self.transformer["wpe"](positions))

    def blocks(self, x: Tensor, cache: list[LayerCache] | None = None) -> Tensor:
        """All layers and the last LayerNorm, on embeddings x, (B, T, C)."""
        for layer, block in enumerate(cast(nn.ModuleList, self.transformer["h"])):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache[layer] if cache is not None else None)
        return cast(Tensor, self.transformer["ln_f"](x))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, (B, T, V), and with targets, (B, T), the mean cross-entropy in nats per token."""
        logits = self.lm_head(self.hidden(idx).to(self.lm_head.weight.dtype))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))

    @classmethod
    def from_pretrained(cls, source: str) -> "GPT":
        """Hugging Face's GPT-2 of this name (`gpt2` ... `gpt2-xl`, or any GPT-2 of the Hub) or local folder.

        Raises UserError without the package transformers, without a network, or if it is no GPT-2.
        """
        try:
            from transformers import GPT2LMHeadModel
        except ImportError:
            raise UserError(
                "loading Hugging Face weights needs the package transformers: pip install 'transformers>=5,<6'"
            ) from None
        # OpenAI's four by their full name: a folder called gpt2, such as this package, would be taken for a local one
        location = f"openai-community/{source}" if source in PRESETS else source
        try:
            theirs = GPT2LMHeadModel.from_pretrained(location, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot load GPT-2 from {source!r} (a name on the Hugging Face Hub, which needs a network, "
                f"or a local folder): {reason}"
            ) from None
        c = theirs.config
        if c.activation_function != "gelu_new" or c.layer_norm_epsilon != 1e-5 or not c.tie_word_embeddings:
            raise UserError(f"{source!r} differs from GPT-2 in its activation, its LayerNorm or its head")
        model = cls(
            GPTConfig(
                block_size=c.n_positions,
                vocab_size=c.vocab_size,
                n_layer=c.n_layer,
                n_head=c.n_head,
                n_embd=c.n_embd,
            )
        )
        model.load_state_dict(swap_conv1d_layout(theirs.state_dict()))
        return model


def swap_conv1d_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in the other layout: Hugging Face's from ours, or ours from Hugging Face's.

    OpenAI's `Conv1D` keeps (in, out) where `nn.Linear` keeps (out, in).
    """
    return {
        name: weight.t().contiguous() if name.endswith(CONV1D_WEIGHTS) else weight
        for name, weight in state_dict.items()
    }
