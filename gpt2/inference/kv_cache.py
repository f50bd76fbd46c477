"""The KV cache, and the two passes that use it: prefill (a part of a prompt) and decode (the tokens after it)."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.inference.speculation import measure_steps
from gpt2.kernels import library
from gpt2.kernels.compiled import CompiledModel, supports
from gpt2.kernels.linear import choose_kernels, linear_layers, measured_here
from gpt2.model.transformer import GPT

PREFILL_CHUNKS = (64, 128, 256, 512)
DEFAULT_CHUNK = 128
MAX_STALL_S = 0.1
"""What other requests wait at most for a part of a prompt."""
MAX_COMPILED_ERROR = 0.1
DRIFT = 1.001
"""What the time of a step grows by at each step, so that it follows a machine that became slower."""
DECODE_ROWS = (1, 8)


class _PrefillAttention:
    """A layer's attention during prefill: new tokens of one slot attend to the cached ones and to themselves."""

    def __init__(self, buffer: Tensor, cached: int) -> None:
        self.buffer, self.cached = buffer, cached  # (2, n_head, context_length, head_size), and tokens in it

    def attend(self, qkv: Tensor) -> Tensor:
        length = self.cached + qkv.size(3)
        self.buffer[:, :, self.cached : length] = qkv[1:, 0]
        q, k, v = qkv.unbind(0)
        if not self.cached:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        k, v = self.buffer[:, None, :, :length].to(q.dtype).unbind(0)
        visible = torch.ones(qkv.size(3), length, dtype=torch.bool, device=q.device).tril(self.cached)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


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
            q = qkv[0, row : row + 1]
            new.copy_(qkv[1:, row, :, 0])
            outputs.append(F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype)))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class ModelRunner:
    """A model and its KV cache: the logits after prompts, and after the next tokens of many sequences.

    It computes with PyTorch's operators, and once they are compiled, with the kernels of `gpt2.kernels`, which have a
    KV cache of their own. A sequence stays with what it began with. The system allocates the pages of a cache as they
    fill.

    cache: PyTorch's, keys and values of the tokens in each slot, (slots, n_layer, 2, n_head, context_length,
    head_size). lengths: number of tokens in each slot.
    """

    def __init__(self, model: GPT, slots: int, context_length: int) -> None:
        """model: as `gpt2.inference.quantization.quantize` returns it, or a GPT."""
        self.model, config = model, model.config
        blocks: Any = model.transformer["h"]
        c_attn = blocks[0].attn.c_attn
        self.is_quantized = hasattr(c_attn, "out_dtype")
        self.dtype: str = c_attn.weights.dtype if self.is_quantized else ""
        self.problem = self._why_not_compiled()
        self.can_compile = not self.problem
        self.cache = torch.empty(
            (slots, config.n_layer, 2, config.n_head, context_length, config.head_size),
            dtype=c_attn.out_dtype if self.is_quantized else c_attn.weight.dtype,
            device=model.device,
        )
        self.lengths = [0] * slots
        self.chunks = {False: DEFAULT_CHUNK, True: DEFAULT_CHUNK}  # of prompts, by whether they are compiled
        self.compiled: CompiledModel | None = None
        self.decode_seconds: list[float] = []  # of the compiled kernels, for 1, 2, ... tokens of a sequence
        self._build: library.Build | None = None
        self._is_released = False

    def _why_not_compiled(self) -> str:
        if self.model.device.type != "cpu":
            return f"the model is on {self.model.device.type}"
        if not self.is_quantized:
            return "the model is not one of gpt2.quantize"
        if not supports(self.model.config):
            return "the compiled kernels do not take models of these sizes"
        return "" if library.is_possible() else "there is no compiler, or it is turned off"

    def prepare(self) -> None:
        """Uses the compiled kernels, or starts to compile them. Without, it measures which of PyTorch's are fastest."""
        if not self.is_quantized or self.model.device.type != "cpu" or library.is_off():
            return
        if self.can_compile and not self.attach_compiled():
            self._build = library.start_build()
        if self.compiled is None and self._build is None:
            choose_kernels(linear_layers(self.model), DECODE_ROWS)
            facts = f"prefill, {self.dtype}, {self.model.config}, context {self.cache.size(4)}"
            self.chunks[False] = int(measured_here(facts, lambda: self._measure_chunk(self.prefill)))

    def _measure_chunk(self, prefill: Callable[[int, list[int]], object]) -> float:
        """The largest number of tokens that are processed in MAX_STALL_S."""
        count = min(DEFAULT_CHUNK, self.cache.size(4))
        seconds = min(measure_steps(lambda _: prefill(0, [0] * count), 1)[0] for _ in range(2))
        fitting = [chunk for chunk in PREFILL_CHUNKS if chunk * seconds / count < MAX_STALL_S]
        return float(max(fitting, default=PREFILL_CHUNKS[0]))

    def poll(self, timeout_s: float = 0) -> bool:
        """Uses the compiled kernels once they are there; waits for them up to timeout_s. Returns whether it does."""
        if self._build is not None and self._build.has_ended(timeout_s):
            self.problem, self._build = self._build.problem(), None
            if self.problem or not self.attach_compiled():
                self.can_compile = False
                choose_kernels(linear_layers(self.model), DECODE_ROWS)
        return self.compiled is not None

    def load_compiled(self) -> CompiledModel | None:
        """The model with the compiled kernels, if they are there."""
        path = library.library_path()
        if not self.can_compile or not path.is_file():
            return None
        try:
            return CompiledModel(library.load(path), self.model, len(self.lengths), self.cache.size(4))
        except library.CompileError as error:
            self.problem = str(error)
            return None

    def attach_compiled(self) -> bool:
        """Uses the compiled kernels if they are there, and compute what PyTorch's operators do."""
        compiled = self.load_compiled()
        if compiled is None:
            return False
        saved, length = self.cache[0, :, :, :, 0].clone(), self.lengths[0]
        expected = self.logits(self.prefill(0, [0])).float()
        self.cache[0, :, :, :, 0] = saved
        found = compiled.decode([0], [0], [0])[0][0]
        error_norm = float((found - expected).norm() / expected.norm())
        if error_norm < MAX_COMPILED_ERROR or not torch.isfinite(expected).all():
            self.compiled = compiled
            self.chunks[True] = int(self._measure_chunk(self.prefill_compiled))
            self.decode_seconds = self._measure_decode()
        else:
            self.problem = f"the compiled kernels differ from PyTorch by {error_norm:.2g}"
        self.lengths[0] = length
        return self.compiled is not None

    def release(self) -> None:
        """Frees what only PyTorch's path needs, which no sequence uses any more."""
        if not self._is_released:
            self._is_released = True
            self.cache = torch.empty_like(self.cache)
            for layer in linear_layers(self.model):
                layer.release()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Allocates the memory of all slots and of the longest prompt."""
        length, chunk = self.cache.size(4), self.chunks[self.compiled is not None]
        cache = self.cache if self.compiled is None else self.compiled.cache
        prefill = self.prefill if self.compiled is None else self.prefill_compiled
        cache.zero_()
        for first in range(0, length, chunk):
            prefill(0, [0] * min(chunk, length - first), cached=first)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], *, cached: int = 0) -> Tensor:
        """Appends `ids` to the first `cached` tokens of the slot. Returns the last hidden state, (C,)."""
        layers = [_PrefillAttention(layer, cached) for layer in self.cache[slot].unbind(0)]
        positions = torch.arange(cached, cached + len(ids), device=self.model.device)[None]
        hidden = self.model.hidden(self._on_device([list(ids)]), layers, positions)
        self.lengths[slot] = cached + len(ids)
        return hidden[0, -1]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (V,), of a hidden state, (C,)."""
        return cast(Tensor, self.model.lm_head(hidden[None]))[0]

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits, (len(slots), V), after appending one token to each slot, with PyTorch's operators."""
        lengths = self.lengths
        per_slot = []
        for slot in slots:
            keys, values = self.cache[slot, :, :, None, :, : lengths[slot] + 1].unbind(1)
            new = self.cache[slot, :, :, :, lengths[slot]]
            per_slot.append(list(zip(keys.unbind(0), values.unbind(0), new.unbind(0), strict=True)))
        layers = [_DecodeAttention(list(layer)) for layer in zip(*per_slot, strict=True)]
        positions = self._on_device([[lengths[slot]] for slot in slots])
        hidden = self.model.hidden(self._on_device([[token] for token in tokens]), layers, positions)
        for slot in slots:
            lengths[slot] += 1
        return cast(Tensor, self.model.lm_head(hidden[:, 0]))

    def prefill_compiled(self, slot: int, ids: Sequence[int], *, cached: int = 0) -> None:
        """As `prefill`, with the compiled kernels: appends `ids` to the first `cached` tokens of the slot."""
        assert self.compiled is not None
        self.compiled.prefill(slot, ids, cached)
        self.lengths[slot] = cached + len(ids)

    def decode_compiled(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Appends tokens to each slot, with the compiled kernels.

        Returns for each slot the logits after its tokens, (number of tokens, V), and their logsumexp.
        """
        assert self.compiled is not None
        rows = [
            (slot, token, self.lengths[slot] + index)
            for slot, own in zip(slots, tokens, strict=True)
            for index, token in enumerate(own)
        ]
        start_s = time.perf_counter()
        logits, totals = self.compiled.decode(*zip(*rows, strict=True))
        if len(slots) == 1 and len(rows) <= len(self.decode_seconds):  # the measurement may have been disturbed
            known = self.decode_seconds[len(rows) - 1]
            self.decode_seconds[len(rows) - 1] = min(DRIFT * known, time.perf_counter() - start_s)
        for slot, own in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(own)
        counts = [len(own) for own in tokens]
        return list(torch.split(logits, counts)), list(torch.split(totals, counts))

    def _measure_decode(self) -> list[float]:
        """Seconds of a compiled step for 1, 2, ... tokens of a sequence."""

        def step(count: int) -> None:
            self.lengths[0] = 0
            self.decode_compiled([0], [[0] * count])

        return measure_steps(step, self.cache.size(4))

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
