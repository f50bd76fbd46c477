"""Linear layers for inference: the kernels that PyTorch has for each dtype, and which is fastest on this machine.

All of PyTorch's private operators are called here. One that is missing, or fails, is no candidate.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.device import Measured, remembered
from gpt2.files import cache_folder
from gpt2.kernels.blocks import to_blocks
from gpt2.kernels.int4 import ZERO
from gpt2.kernels.library import LIMITS, cpu_identity
from gpt2.kernels.weights import INT8_MAX, LinearWeights, quantize_int8
from gpt2.model.transformer import GPT

UINT8_ZERO = 128
"""Zero point of the inputs, which are unsigned: signed inputs have fast kernels only on CPUs with AMX."""
FEW_ROWS = 16
ROUNDS = 4
FAILURES = (AttributeError, NotImplementedError, RuntimeError, TypeError)
Kernel = Callable[[Tensor], Tensor]
"""A linear layer: (N, in_features) to (N, out_features)."""
_MKLDNN: Any = torch.ops.mkldnn
_ONEDNN: Any = torch.ops.onednn
_QLINEAR: Any = _ONEDNN.qlinear_pointwise.default if hasattr(_ONEDNN, "qlinear_pointwise") else None


class Plain:
    """`F.linear`, in fp32 or bf16."""

    def __init__(self, weights: LinearWeights) -> None:
        self.weight = weights.weight
        self.bias = None if weights.bias is None else weights.bias.to(self.weight.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        return F.linear(rows.to(self.weight.dtype), self.weight, self.bias)


class MatrixVector(Plain):
    """`mv` for a single row."""

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        if len(rows) > 1:
            return super().__call__(rows)
        y = self.weight.mv(rows.to(self.weight.dtype).view(-1))[None]
        return y if self.bias is None else y.add_(self.bias)


class Prepacked(Plain):
    """oneDNN, with weights in its own layout."""

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__(weights)
        self.dtype = self.weight.dtype
        self.weight = _MKLDNN._reorder_linear_weight(self.weight, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        rows = rows.to(self.dtype)
        return cast(Tensor, _MKLDNN._linear_pointwise(rows, self.weight, self.bias, "none", [], ""))


class Int8Prepacked:
    """Exact 8-bit products by oneDNN, with weights in its own layout.

    Each output channel of the weights and each row of the input has its own scale, max|v| / 127: the vector-wise
    quantisation of LLM.int8(), https://arxiv.org/abs/2208.07339, section 3.1, without its outlier columns. Integer
    sums are exact, so the result of a row is bitwise independent of the other rows in the batch.
    """

    def __init__(self, weights: LinearWeights) -> None:
        if not has_exact_int8_matmul():
            raise NotImplementedError("8-bit products are not exact here")
        assert weights.scale is not None
        self.bias = weights.bias
        self.scale = weights.scale / INT8_MAX  # includes the factor 127 of the input scale
        self.zeros = torch.zeros(len(self.scale), dtype=torch.long)
        self.weight = _ONEDNN.qlinear_prepack(weights.numbers(), None)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        rows = rows.float()
        largest = rows.abs().amax(-1, True)
        q = (rows * (INT8_MAX / largest)).add_(UINT8_ZERO + 0.5).to(torch.uint8)  # the half makes truncation round
        y: Tensor = _QLINEAR(
            q, 1.0, UINT8_ZERO, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y.mul_(largest)
        return y if self.bias is None else y.add_(self.bias)


class Int8WeightOnly:
    """8-bit weights times inputs in bf16 for few rows, in fp32 for many."""

    def __init__(self, weights: LinearWeights) -> None:
        assert weights.scale is not None
        self.weight, self.bias, self.scale = weights.numbers(), weights.bias, weights.scale

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        if len(rows) <= FEW_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).float()
        else:
            y = F.linear(rows.float(), self.weight.float()).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


class Dequantized:
    """Weights dequantized to fp32 for each call."""

    def __init__(self, weights: LinearWeights) -> None:
        self.weights = weights

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        return F.linear(rows.float(), self.weights.dequantized(), self.weights.bias)


class DequantizedBf16(Dequantized):
    """Weights dequantized to bf16 for each call."""

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        y = F.linear(rows.bfloat16(), self.weights.dequantized(torch.bfloat16)).float()
        return y if self.weights.bias is None else y.add_(self.weights.bias)


class Int4AsInt8(Int8Prepacked):
    """4-bit weights rounded once more, to 8 bits: for prompts, with many rows."""

    def __init__(self, weights: LinearWeights) -> None:
        weight, scale = quantize_int8(weights.dequantized())
        super().__init__(LinearWeights("int8", weights.shape, to_blocks(weight), scale, weights.bias))


class Int4Packed:
    """4-bit weights in PyTorch's own layout, times inputs in bf16."""

    OUT_MULTIPLE = 16

    def __init__(self, weights: LinearWeights) -> None:
        out, width = weights.shape
        padding = -out % self.OUT_MULTIPLE
        q = F.pad(weights.numbers().to(torch.int32) + ZERO, (0, 0, 0, padding))
        scale = F.pad(weights.group_scales(), (0, 0, 0, padding)).T.bfloat16()  # (in / group, out)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        self.scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), 2).contiguous()
        self.group, self.out, self.bias = width // len(scale), out, weights.bias

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: Tensor = operator(rows.bfloat16(), self.weight, self.group, self.scales_and_zeros)
        y = y[:, : self.out].float()
        return y if self.bias is None else y.add_(self.bias)


CANDIDATES: dict[str, tuple[Any, ...]] = {
    "fp32": (Plain, MatrixVector, Prepacked),
    "bf16": (Plain, MatrixVector, Prepacked),
    "int8": (Int8Prepacked, Int8WeightOnly, Dequantized),
    "int4": (Dequantized, DequantizedBf16, Int4AsInt8, Int4Packed),
}
"""The kernels of each dtype. The first that works here is used until they are measured."""


class InferenceLinear:
    """A linear layer, (..., in_features) to (..., out_features): its weights, and the kernel that multiplies them.

    out_dtype: dtype of the result. kind: name of the kernel. It is made when it is first called, because a kernel may
    hold a copy of the weights, which the compiled kernels do not need.
    """

    def __init__(self, weights: LinearWeights, out_dtype: torch.dtype) -> None:
        self.weights, self.out_dtype = weights, out_dtype
        self.kind = ""
        self._kernel: Kernel | None = None

    @property
    def kernel(self) -> Kernel:
        """The kernel of this kind; without one that works here, the first candidate that does."""
        if self._kernel is None:
            candidates = CANDIDATES[self.weights.dtype]
            names = sorted((each.__name__ for each in candidates), key=lambda name: name != self.kind)
            kernels = (kernel for name in names if (kernel := make_kernel(name, self.weights)) is not None)
            self._kernel = next(kernels, None) or candidates[0](self.weights)  # which says why it does not work
            self.kind = type(self._kernel).__name__
        return self._kernel

    def use(self, kind: str) -> None:
        """Changes the kernel."""
        if self.kind != kind:
            self.kind, self._kernel = kind, None

    def release(self) -> None:
        """Frees the kernel, until it is called again."""
        self._kernel = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y = self.kernel(x.reshape(-1, x.size(-1)))
        return y.to(self.out_dtype).view(*x.shape[:-1], -1)


def linear_layers(model: GPT) -> Iterator[InferenceLinear]:
    """The linear layers of a quantized model, the head last."""
    blocks: Any = model.transformer["h"]
    for block in blocks:
        yield from (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    yield cast(Any, model.lm_head)


def make_kernel(name: str, weights: LinearWeights) -> Kernel | None:
    """The kernel of this name for these weights, or None if it does not work here."""
    kind = next(candidate for candidate in CANDIDATES[weights.dtype] if candidate.__name__ == name)
    with suppress(*FAILURES), torch.inference_mode():
        kernel: Kernel = kind(weights)
        kernel(torch.zeros(1, weights.shape[1], device=weights.weight.device))
        return kernel
    return None


@torch.inference_mode()
def choose_kernels(layers: Iterable[InferenceLinear], rows: Sequence[int]) -> None:
    """Gives each layer the kernel that is fastest on this machine for these numbers of rows.

    Each shape is measured over all its layers, since one alone may stay in the processor's caches.
    """
    by_shape: dict[tuple[str, tuple[int, int]], list[InferenceLinear]] = {}
    for layer in layers:
        by_shape.setdefault((layer.weights.dtype, layer.weights.shape), []).append(layer)
    for (dtype, shape), group in by_shape.items():
        names = [each.__name__ for each in CANDIDATES[dtype]]
        facts = f"{dtype}, {len(group)} x {shape}, rows {list(rows)}, {', '.join(names)}"
        name = measured_here(facts, lambda group=group, names=names: _fastest(group, names, rows))  # type: ignore[misc]
        for layer in group if name in names else []:
            layer.use(name)


def measured_here(facts: str, measure: Callable[[], Measured]) -> Measured:
    """What `measure` returns, kept for these facts, this CPU, version of PyTorch, and number of threads."""
    limits = "".join(f"{name}={os.environ[name]}, " for name in LIMITS if name in os.environ)
    machine = f"{cpu_identity()}, {limits}torch {torch.__version__}, {torch.get_num_threads()} threads"
    return remembered(cache_folder() / "measured.json", f"{machine}: {facts}", measure)


def _fastest(layers: list[InferenceLinear], names: list[str], rows: Sequence[int]) -> str:
    inputs = [torch.randn(count, layers[0].weights.shape[1]) for count in rows]
    seconds = {}
    for name in names:
        kernels = [make_kernel(name, layer.weights) for layer in layers]
        if None not in kernels:
            # per row: a kernel that is slow for many rows must not win by a small gain for one
            seconds[name] = sum(_seconds(cast(list[Kernel], kernels), x) / len(x) for x in inputs)
    return min(seconds, key=lambda name: seconds[name])


def _seconds(kernels: list[Kernel], x: Tensor) -> float:
    best = math.inf
    for round_ in range(ROUNDS):
        start_s = time.perf_counter()
        for kernel in kernels:
            kernel(x)
        if round_:  # the first round warms up
            best = min(best, time.perf_counter() - start_s)
    return best


@cache
def has_exact_int8_matmul() -> bool:
    """Whether 8-bit products are exact with this CPU and this torch, also at the largest values.

    CPUs without VNNI add pairs of products in 16 bits, which saturates.
    """
    rows, ones, zeros = torch.full((2, 192), INT8_MAX), torch.ones(32), torch.zeros(32).long()
    rows[1] *= -1
    rows = (rows + UINT8_ZERO).to(torch.uint8)
    try:
        packed = _ONEDNN.qlinear_prepack(torch.full((32, 192), INT8_MAX, dtype=torch.int8), None)
        found = _QLINEAR(rows, 1.0, UINT8_ZERO, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    except FAILURES:
        return False
    expected = 192.0 * INT8_MAX**2 * torch.tensor([[1.0], [-1.0]]).expand(2, 32)
    return bool(torch.equal(found, expected))
