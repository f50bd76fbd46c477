"""Calls the compiled decode step with the weights of a model."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import GPTConfig
from gpt2.kernels.library import CompileError
from gpt2.kernels.weights import LinearWeights
from gpt2.model.transformer import GPT

DTYPE_CODES = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
TENSOR_CODES = {torch.float32: 0, torch.bfloat16: 1}
WIDTH_MULTIPLE, INT4_WIDTH_MULTIPLE, HEAD_MULTIPLE = 64, 128, 32
MAX_CHECK_ERROR = 0.03


class _Matrix(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scale", "sums", "bias")),
        *((name, c_int32) for name in ("out", "in_", "group")),
    ]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        ("norm_1", _Norm),
        ("attention", _Matrix),
        ("attention_projection", _Matrix),
        ("norm_2", _Norm),
        ("expansion", _Matrix),
        ("projection", _Matrix),
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("weight_dtype", "embedding_dtype", "cache_dtype")),
        *((name, c_int32) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "context_length")),
        ("wte", c_void_p),
        ("wpe", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Matrix),
    ]


class _Row(Structure):
    _fields_ = [("token", c_int32), ("position", c_int32), ("cache", c_void_p)]


def supports(config: GPTConfig, dtype: str) -> bool:
    """Whether the compiled step takes models of these sizes: vectors have to fit into a row."""
    multiple = INT4_WIDTH_MULTIPLE if dtype == "int4" else WIDTH_MULTIPLE
    return config.n_embd % multiple == 0 and config.head_size % HEAD_MULTIPLE == 0 and config.vocab_size >= 4


class CompiledDecoder:
    """The compiled decode step for one model and its KV cache."""

    def __init__(self, library: ctypes.CDLL, model: GPT, cache: Tensor) -> None:
        """model: as `gpt2.inference.quantization.quantize` returns it: its linear layers have `weights`.

        cache: (slots, n_layer, 2, n_head, context_length, head_size), fp32 or bf16.
        """
        self.library, self.cache = library, cache
        self.max_rows: int = library.max_rows()
        self._tensors: list[Tensor] = []  # what the pointers point to
        config = model.config
        parts: Any = model.transformer
        self._layers = (_Layer * config.n_layer)(*map(self._layer, parts["h"]))
        head: Any = model.lm_head
        wte, wpe = (self._kept(parts[name].weight.detach()) for name in ("wte", "wpe"))
        self._model = _Model(
            DTYPE_CODES[parts["h"][0].mlp.c_fc.weights.dtype],
            TENSOR_CODES[wte.dtype],
            TENSOR_CODES[cache.dtype],
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.vocab_size,
            cache.size(4),
            wte.data_ptr(),
            wpe.data_ptr(),
            self._layers,
            self._norm(parts["ln_f"]),
            self._matrix(head.weights),
        )
        self._vocab_size = config.vocab_size
        self._scratch = torch.empty(0)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Appends tokens to slots at positions, and returns the logits after each, (len(slots), V).

        A slot may occur several times, with consecutive positions. Raises IndexError for what is not there.
        """
        limits = ((slots, self.cache.size(0)), (tokens, self._vocab_size), (positions, self.cache.size(4)))
        if not all(0 <= each < limit for values, limit in limits for each in values):
            raise IndexError("a slot, token or position does not exist")
        stride = self.cache.stride(0) * self.cache.element_size()
        rows = (_Row * len(slots))(
            *(
                _Row(token, position, self.cache.data_ptr() + slot * stride)
                for slot, token, position in zip(slots, tokens, positions, strict=True)
            )
        )
        logits = torch.empty(len(slots), self._vocab_size)
        for first in range(0, len(slots), self.max_rows):
            self._call(byref(rows, first * ctypes.sizeof(_Row)), logits[first : first + self.max_rows])
        return logits

    def multiply(self, rows: int) -> None:
        """Computes the matrix products of a step with this many rows, at most max_rows, and nothing else."""
        self._call(None, torch.empty(min(rows, self.max_rows), self._vocab_size))

    def _call(self, rows: Any, logits: Tensor) -> None:
        threads = torch.get_num_threads()
        needed = self.library.scratch_bytes(byref(self._model), threads)
        if self._scratch.nbytes < needed:
            self._scratch = torch.empty(needed // 4)
        pointers = c_void_p(logits.data_ptr()), c_void_p(self._scratch.data_ptr())
        self.library.decode(byref(self._model), rows, len(logits), *pointers, threads)

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._tensors.append(tensor)
        return tensor

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._kept(norm.weight.detach()).data_ptr(), self._kept(norm.bias.detach()).data_ptr())

    def _matrix(self, weights: LinearWeights) -> _Matrix:
        out, in_ = weights.shape
        sums = weights.weight.sum(1, dtype=torch.int32) if weights.dtype == "int8" else None
        pointers = [
            None if tensor is None else self._kept(tensor).data_ptr()
            for tensor in (weights.weight, weights.scale, sums, weights.bias)
        ]
        group = in_ // weights.scale.size(1) if weights.dtype == "int4" and weights.scale is not None else 0
        return _Matrix(*pointers, out, in_, group)

    def _layer(self, block: Any) -> _Layer:
        return _Layer(
            self._norm(block.ln_1),
            self._matrix(block.attn.c_attn.weights),
            self._matrix(block.attn.c_proj.weights),
            self._norm(block.ln_2),
            self._matrix(block.mlp.c_fc.weights),
            self._matrix(block.mlp.c_proj.weights),
        )


def check(library: ctypes.CDLL) -> None:
    """Compares the library with PyTorch, on a small model in each dtype. Raises CompileError if they differ."""
    config = GPTConfig(block_size=40, vocab_size=97, n_layer=2, n_head=2, n_embd=128)
    ids = [(7 * i) % 97 for i in range(20)]
    for dtype in DTYPE_CODES:
        for cache_dtype in TENSOR_CODES:
            error = _relative_error(library, config, ids, dtype, cache_dtype)
            if not error < MAX_CHECK_ERROR:
                raise CompileError(f"the compiled decode step is wrong on this CPU: {dtype} differs by {error:.2g}")


@torch.inference_mode()
def _relative_error(
    library: ctypes.CDLL, config: GPTConfig, ids: list[int], dtype: str, cache_dtype: torch.dtype
) -> float:
    model = GPT(config)  # with the weights as they are after quantization
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 8)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            is_int4_head = dtype == "int4" and module is model.lm_head
            weights: Any = LinearWeights.of(module, "int8" if is_int4_head else dtype)
            module.weights = weights
            if module is not model.lm_head:
                module.weight.copy_(weights.dequantized())
    head: Any = model.lm_head
    expected = model.hidden(torch.tensor([ids])) @ head.weights.dequantized().T
    cache = torch.zeros(1, config.n_layer, 2, config.n_head, config.block_size, config.head_size, dtype=cache_dtype)
    decoder = CompiledDecoder(library, model, cache)
    found = torch.cat(
        [
            decoder.decode([0], ids[:1], [0]),
            *(decoder.decode([0] * 5, ids[i : i + 5], range(i, min(i + 5, 20))) for i in range(1, 16, 5)),
            decoder.decode([0] * 4, ids[16:], range(16, 20)),
        ]
    )
    return float((found - expected[0]).norm() / expected.norm())
