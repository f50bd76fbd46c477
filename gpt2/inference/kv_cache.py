"""The KV cache, and the two passes that use it: prefill (a whole prompt) and decode (one token per sequence)."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.model.transformer import GPT


class KVCache:
    """Keys and values of the tokens in each slot, (slots, n_layer, 2, n_head, context_length, head_size)."""

    def __init__(self, config: GPTConfig, slots: int, context_length: int, like: Tensor) -> None:
        """Buffers with the dtype and device of `like`; the system allocates their pages as they fill."""
        self.buffer = like.new_empty(slots, config.n_layer, 2, config.n_head, context_length, config.head_size)
        self.lengths = [0] * slots


class _PrefillAttention:
    """A layer's attention during prefill: the prompt attends to itself, and fills the cache of one slot."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # (2, n_head, context_length, head_size)

    def attend(self, qkv: Tensor) -> Tensor:
        self.buffer[:, :, : qkv.size(3)] = qkv[1:, 0]
        q, k, v = qkv.unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _DecodeAttention:
    """A layer's attention during decode: one new token per slot, each with its own number of cached tokens.

    Each token attends to exactly its own slot, so that its result does not depend on the rest of the batch.
    """

    def __init__(self, slots: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        # keys and values including the new token, (1, n_head, length, head_size), and the entry of the new token
        self.slots = slots

    def attend(self, qkv: Tensor) -> Tensor:
        outputs = []
        for row, (keys, values, new) in enumerate(self.slots):
            new.copy_(qkv[1:, row, :, 0])
            outputs.append(F.scaled_dot_product_attention(qkv[0, row : row + 1], keys, values))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class ModelRunner:
    """A model and its KV cache: the logits of one prompt, or of the next token of many sequences."""

    def __init__(self, model: GPT, slots: int, context_length: int) -> None:
        self.model = model
        blocks: Any = model.transformer["h"]
        c_attn = blocks[0].attn.c_attn
        # quantized layers have an out_dtype
        like = torch.empty(0, dtype=getattr(c_attn, "out_dtype", c_attn.weight.dtype), device=model.device)
        self.cache = KVCache(model.config, slots, context_length, like)

    def prefill(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Logits, (V,), of the token after `ids`. Replaces the content of the slot."""
        caches = [_PrefillAttention(layer) for layer in self.cache.buffer[slot].unbind(0)]
        hidden = self.model.hidden(self._on_device([list(ids)]), caches)
        self.cache.lengths[slot] = len(ids)
        return cast(Tensor, self.model.lm_head(hidden[0, -1:]))[0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits, (len(slots), V), after appending one token to each slot."""
        lengths = self.cache.lengths
        per_slot = []
        for slot in slots:
            keys, values = self.cache.buffer[slot, :, :, None, :, : lengths[slot] + 1].unbind(1)
            new = self.cache.buffer[slot, :, :, :, lengths[slot]]
            per_slot.append(list(zip(keys.unbind(0), values.unbind(0), new.unbind(0), strict=True)))
        caches = [_DecodeAttention(list(layer)) for layer in zip(*per_slot, strict=True)]
        positions = self._on_device([[lengths[slot]] for slot in slots])
        hidden = self.model.hidden(self._on_device([[token] for token in tokens]), caches, positions)
        for slot in slots:
            lengths[slot] += 1
        return cast(Tensor, self.model.lm_head(hidden[:, 0]))

    def _on_device(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)


def window_start(num_tokens: int, context_length: int) -> int:
    """Index of the first token that the model attends to when it predicts the token after `num_tokens`.

    0 until the context is full. Then the window moves by half a context at a time, so that the KV cache stays valid in
    between.
    """
    if num_tokens <= context_length:
        return 0
    hop = max(1, context_length // 2)
    return math.ceil((num_tokens - context_length) / hop) * hop
