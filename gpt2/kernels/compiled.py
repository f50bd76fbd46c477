"""Calls the compiled prefill and decode with the weights of a model."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import GPTConfig
from gpt2.kernels.blocks import INPUTS
from gpt2.kernels.library import CompileError
from gpt2.kernels.weights import LinearWeights
from gpt2.model.transformer import GPT

DTYPE_CODES = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
TENSOR_CODES = {torch.float32: 0, torch.bfloat16: 1}
WIDTH_MULTIPLE, HEAD_MULTIPLE = 64, 32
MAX_CHECK_ERROR = 0.03


class _Matrix(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scale", "sums", "bias")),
        *((name, c_int32) for name in ("out", "in_")),
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
        *((name, c_int32) for name in ("weight_dtype", "embedding_dtype")),
        *((name, c_int32) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "context_length")),
        ("wte", c_void_p),
        ("wpe", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Matrix),
    ]


class _Row(Structure):
    _fields_ = [("token", c_int32), ("position", c_int32), ("cache", c_void_p)]


def supports(config: GPTConfig) -> bool:
    """Whether the compiled kernels take models of these sizes: vectors have to fit into a row."""
    return config.n_embd % WIDTH_MULTIPLE == 0 and config.head_size % HEAD_MULTIPLE == 0 and config.vocab_size >= 4


class CompiledModel:
    """The compiled prefill and decode for one model, with a KV cache.

    cache: keys and values of the tokens in each slot, (slots, bytes): in fp32 or bf16 as the weights, and in 8 bits,
    with a scale for each token and head, for int8 and int4.
    """

    def __init__(self, library: ctypes.CDLL, model: GPT, slots: int, context_length: int) -> None:
        """model: as `gpt2.inference.quantization.quantize` returns it: its linear layers have `weights`."""
        self.library = library
        self.max_rows: int = library.max_rows()
        self._tensors: list[Tensor] = []  # what the pointers point to
        config = model.config
        parts: Any = model.transformer
        dtype = parts["h"][0].mlp.c_fc.weights.dtype
        self._layers = (_Layer * config.n_layer)(*map(self._layer, parts["h"]))
        head: Any = model.lm_head
        wte, wpe = (self._kept(parts[name].weight.detach()) for name in ("wte", "wpe"))
        self._model = _Model(
            DTYPE_CODES[dtype],
            TENSOR_CODES[wte.dtype],
            config.n_layer,
            config.n_head,
            config.n_embd,
            config.vocab_size,
            context_length,
            wte.data_ptr(),
            wpe.data_ptr(),
            self._layers,
            self._norm(parts["ln_f"]),
            self._matrix(head.weights),
        )
        self.cache = torch.empty(slots, library.cache_bytes(byref(self._model)), dtype=torch.uint8)
        self._vocab_size, self._context_length = config.vocab_size, context_length
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Appends tokens to the first `start` ones of a slot. Raises IndexError for what is not there.

        How a prompt is divided changes nothing.
        """
        self._check([slot], tokens, [start, start + len(tokens) - 1])
        ids = (c_int32 * len(tokens))(*tokens)
        threads = torch.get_num_threads()
        scratch = self._scratch_for(self.library.prefill_scratch_bytes(byref(self._model), threads))
        self.library.prefill(byref(self._model), ids, start, len(ids), self._address(slot), scratch, threads)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Appends tokens to slots at positions. Returns the logits after each, (len(slots), V), and their logsumexp.

        A logsumexp is NaN if a logit is not finite. A slot may occur several times, with consecutive positions. Raises
        IndexError for what is not there.
        """
        self._check(slots, tokens, positions)
        rows = (_Row * len(slots))(
            *(
                _Row(token, position, self._address(slot))
                for slot, token, position in zip(slots, tokens, positions, strict=True)
            )
        )
        logits, totals = torch.empty(len(slots), self._vocab_size), torch.empty(len(slots))
        for first in range(0, len(slots), self.max_rows):
            part = slice(first, first + self.max_rows)
            self._decode(byref(rows, first * ctypes.sizeof(_Row)), logits[part], totals[part])
        return logits, totals

    def multiply(self, rows: int) -> None:
        """Computes the matrix products of a decode step with this many rows, at most max_rows, and nothing else."""
        count = min(rows, self.max_rows)
        self._decode(None, torch.empty(count, self._vocab_size), torch.empty(count))

    def _decode(self, rows: Any, logits: Tensor, totals: Tensor) -> None:
        threads = torch.get_num_threads()
        scratch = self._scratch_for(self.library.decode_scratch_bytes(byref(self._model), threads))
        pointers = c_void_p(logits.data_ptr()), c_void_p(totals.data_ptr()), scratch
        self.library.decode(byref(self._model), rows, len(logits), *pointers, threads)

    def _check(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> None:
        limits = ((slots, self.cache.size(0)), (tokens, self._vocab_size), (positions, self._context_length))
        if not all(0 <= each < limit for values, limit in limits for each in values):
            raise IndexError("a slot, token or position does not exist")

    def _address(self, slot: int) -> c_void_p:
        return c_void_p(self.cache.data_ptr() + slot * self.cache.stride(0))

    def _scratch_for(self, num_bytes: int) -> c_void_p:
        if self._scratch.nbytes < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return c_void_p(self._scratch.data_ptr())

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._tensors.append(tensor)
        return tensor

    def _norm(self, norm: Any) -> _Norm:
        return _Norm(self._kept(norm.weight.detach()).data_ptr(), self._kept(norm.bias.detach()).data_ptr())

    def _matrix(self, weights: LinearWeights) -> _Matrix:
        out, in_ = weights.shape
        scale, sums = weights.scale, None
        if scale is not None and weights.dtype == "int8":  # padded as the weights are
            by_word = weights.weight.flatten(2).sum(1, dtype=torch.int32)  # (blocks, 16 * 4), in the fastest order
            sums = by_word.view(-1, INPUTS).sum(1, dtype=torch.int32)
            scale = F.pad(scale, (0, sums.numel() - out))
        pointers = [
            None if tensor is None else self._kept(tensor).data_ptr()
            for tensor in (weights.weight, scale, sums, weights.bias)
        ]
        return _Matrix(*pointers, out, in_)

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
    config = GPTConfig(block_size=80, vocab_size=97, n_layer=2, n_head=2, n_embd=128)
    ids = [(7 * i) % 97 for i in range(60)]
    for dtype in DTYPE_CODES:
        error = _relative_error(library, config, ids, dtype)
        if not error < MAX_CHECK_ERROR:
            raise CompileError(f"the compiled kernels are wrong on this CPU: {dtype} differs by {error:.2g}")


@torch.inference_mode()
def _relative_error(library: ctypes.CDLL, config: GPTConfig, ids: list[int], dtype: str) -> float:
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
    compiled = CompiledModel(library, model, 1, config.block_size)
    results = [compiled.decode([0], ids[:1], [0]), compiled.decode([0] * 5, ids[1:6], range(1, 6))]
    compiled.prefill(0, ids[6:-4], 6)
    results.append(compiled.decode([0] * 4, ids[-4:], range(len(ids) - 4, len(ids))))
    logits, totals = (torch.cat(parts) for parts in zip(*results, strict=True))
    expected = torch.cat((expected[0, :6], expected[0, -4:]))
    wrong_totals = float((totals - logits.logsumexp(1)).abs().max())
    return max(float((logits - expected).norm() / expected.norm()), wrong_totals)
