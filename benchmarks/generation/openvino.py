"""OpenVINO: our model as a stateful graph, whose variables are the KV cache, as OpenVINO GenAI runs its models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """dtype: of the weights. hint: OpenVINO's inference precision. fused: attention and KV cache in one operation."""

    dtype: str
    hint: str
    fused: bool = True


SETTINGS = {
    "fp32": Settings("fp32", "f32"),
    "bf16": Settings("bf16", "bf16"),
    "bf16, not fused": Settings("bf16", "bf16", fused=False),
    "int8": Settings("int8", "f32"),
    "int8, bf16 hint": Settings("int8", "bf16"),
    "int4": Settings("int4", "f32"),
    "int4, bf16 hint": Settings("int4", "bf16"),
}
"""With AMX, 8-bit and 4-bit weights decode faster with f32, and prefill with bf16. Fused attention decodes faster, most
of all late in the context, and takes longer to prefill."""


class GrowingCache:
    """The KV cache of one layer, as tensors that grow."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """Both (B, n_head, T_past, head_size). mask: (T, T_past + T), what each new token attends to."""
        self.keys, self.values, self.mask = keys, values, mask

    def attend(self, qkv: Tensor) -> Tensor:
        """As in `gpt2.model.transformer.LayerCache`."""
        q, k, v = qkv.unbind(0)
        self.keys, self.values = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask)


class Step(nn.Module):
    """Logits after the last of the new tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, beam_idx: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """idx: (B, T). past: keys and values of each layer, (B, n_head, T_past, head_size)."""
        length, num_past = idx.shape[1], past[0].shape[2]
        positions = torch.arange(num_past, num_past + length)
        mask = torch.arange(num_past + length)[None, :] <= positions[:, None]
        past = tuple(tensor.index_select(0, beam_idx) for tensor in past)
        caches = [GrowingCache(k, v, mask) for k, v in zip(past[::2], past[1::2], strict=True)]
        x = self.model.hidden(idx, caches, positions[None])
        present = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        return self.model.lm_head(x[:, -1]), *present


def convert(model: Any, settings: Settings) -> Any:
    """An OpenVINO model with a KV cache, its weights compressed if they are to be int8 or int4."""
    import openvino as ov
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config
    shape = (2, config.n_head, 3, config.n_embd // config.n_head)
    past = [torch.zeros(shape) for _ in range(2 * config.n_layer)]
    example = (
        torch.zeros(2, 4, dtype=torch.long),
        torch.arange(2, dtype=torch.int32 if settings.fused else torch.int64),
        *past,
    )
    with torch.no_grad():
        converted = ov.convert_model(Step(model), example_input=example)
    names = {}
    for number in range(len(past)):
        port, output = converted.inputs[2 + number], converted.outputs[1 + number]
        port.get_tensor().set_names({f"past.{number}"})
        output.get_tensor().set_names({f"present.{number}"})
        port.get_node().set_partial_shape(ov.PartialShape([-1, shape[1], -1, shape[3]]))
        names[f"past.{number}"] = f"present.{number}"
    converted.inputs[0].get_tensor().set_names({"idx"})
    converted.inputs[1].get_tensor().set_names({"beam_idx"})
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, names)
    start_empty(converted)
    if settings.dtype in ("int8", "int4"):
        import nncf

        mode = nncf.CompressWeightsMode
        options = {"mode": mode.INT8_ASYM} if settings.dtype == "int8" else {"mode": mode.INT4_SYM, "group_size": 32}
        converted = nncf.compress_weights(converted, **options)
    return converted


def start_empty(converted: Any) -> None:
    """Gives each KV cache its first value, without tokens: (B, n_head, 0, head_size).

    With it and a beam_idx of 32 bits, OpenVINO fuses attention and KV cache, and appends to the cache in place.
    """
    from openvino import opset13 as ops

    batch_size = ops.gather(ops.shape_of(converted.input("idx")), ops.constant([0]), ops.constant(0))
    for read in (op for op in converted.get_ops() if op.get_type_name() == "ReadValue"):
        shape = read.get_output_partial_shape(0)
        sizes = [batch_size, ops.constant([shape[1].get_length(), 0, shape[3].get_length()])]
        read.set_arguments([ops.broadcast(ops.constant(0.0, read.get_output_element_type(0)), ops.concat(sizes, 0))])
    converted.validate_nodes_and_infer_types()


def weight_bytes(converted: Any, context_length: int) -> int:
    """Bytes of the matrices in a model and of their scales, without the position embedding."""
    constants = (op for op in converted.get_ops() if op.get_type_name() == "Constant")
    return sum(op.get_byte_size() for op in constants if len(op.shape) > 1 and op.shape[0] != context_length)


class Decoder:
    """Greedy decoding with a compiled model."""

    def __init__(self, model: Any, precision: str) -> None:
        """model: as `load_folder` returns it. Raises RuntimeError if OpenVINO cannot compute in the precision here."""
        import openvino as ov

        self.settings = settings = SETTINGS[precision]
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": settings.hint,
        }
        converted = convert(model, settings)
        self.weight_bytes = weight_bytes(converted, model.config.block_size) // (2 if settings.dtype == "bf16" else 1)
        compiled = ov.Core().compile_model(converted, "CPU", options)
        if (used := compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != settings.hint:
            raise RuntimeError(f"OpenVINO computes in {used} here")
        self.request = compiled.create_infer_request()

    def stream(self, prompt: list[int], batch: int, num_tokens: int) -> Iterator[list[int]]:
        """Yields the next token of each sequence."""
        import numpy as np

        self.request.reset_state()
        idx, order = np.array([prompt] * batch), np.arange(batch, dtype=np.int32 if self.settings.fused else np.int64)
        for _ in range(num_tokens):
            self.request.infer({"idx": idx, "beam_idx": order}, share_inputs=True)
            idx = self.request.get_output_tensor(0).data.argmax(1)[:, None]
            yield idx[:, 0].tolist()
