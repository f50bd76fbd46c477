"""llama.cpp, through the low-level functions of llama-cpp-python: GGUF files, and a decoder for several sequences."""

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTIZED = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_K_M": "MOSTLY_Q4_K_M"}
"""The file types that llama.cpp makes of an f32 file, without an importance matrix."""
MAX_BATCH = 1024


class Decoder:
    """Logits of sequences of equal length, each with its own KV cache."""

    def __init__(self, model: Any, sequences: int) -> None:
        """model: as `load` returns it."""
        import llama_cpp as api
        import torch

        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = sequences * api.llama_model_n_ctx_train(model), sequences
        options.n_batch = options.n_ubatch = MAX_BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(model, options)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(MAX_BATCH, 0, 1)
        self.api = api

    def clear(self) -> None:
        """Forgets all sequences."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def decode(self, tokens: list[list[int]], start: int, *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Processes the same number of tokens of each sequence, from position `start` on.

        Returns the logits after the last token of each, (B, V), or after all of them, (B * T, V). The next call
        overwrites them.
        """
        batch, row = self.batch, 0
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[row], batch.pos[row] = token, start + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = all_logits or offset == len(ids) - 1
                row += 1
        batch.n_tokens = row
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        rows = row if all_logits else len(tokens)
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(rows, self.vocab_size))

    def stream(self, prompt: list[int], batch: int, num_tokens: int) -> Iterator[list[int]]:
        """Greedy decoding: yields the next token of each sequence."""
        self.clear()
        logits = self.decode([prompt] * batch, 0)
        for position in range(len(prompt), len(prompt) + num_tokens):
            ids = [int(row.argmax()) for row in logits]
            yield ids
            if position < len(prompt) + num_tokens - 1:
                logits = self.decode([[token] for token in ids], position)


def load(path: Path) -> Any:
    """The model in a GGUF file."""
    import llama_cpp as api

    silence()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {path.name}")
    return model


def silence() -> None:
    """Turns llama.cpp's log off."""
    import llama_cpp as api

    api.llama_log_set(_NO_LOG, ctypes.c_void_p(0))


_NO_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
"""A constant: llama.cpp keeps the pointer."""


def loss(folder: Path, precision: str, tokens: Any, context_length: int) -> float:
    """Nats per token of a model folder in a precision, in the windows of `gpt2.evaluation.scores.score`."""
    import torch
    import torch.nn.functional as F

    from gpt2.data.sampler import windows

    decoder = Decoder(load(gguf_file(folder, precision)), 1)
    total = 0.0
    for inputs, targets in windows(tokens, context_length, 1):
        decoder.clear()
        logits = torch.from_numpy(decoder.decode(inputs.tolist(), 0, all_logits=True).copy())
        total += float(F.cross_entropy(logits.double(), torch.from_numpy(targets[0]), reduction="sum"))
    return total / (len(tokens) - 1)


def system_info() -> str:
    """What llama.cpp was built with, as far as it is switched on."""
    import llama_cpp as api

    parts = api.llama_print_system_info().decode().split("|")
    return " ".join(part.split("=")[0].split(":")[-1].strip() for part in parts if part.strip().endswith("= 1"))


def tensor_types(path: Path) -> dict[str, int]:
    """Bytes of the matrices that a token reads, by type: all but the position embedding."""
    import gguf

    found: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and "position_embd" not in tensor.name:
            found[tensor.tensor_type.name] += int(tensor.n_bytes)
    return dict(found)


def gguf_file(folder: Path, precision: str) -> Path:
    """The GGUF file in a model folder, made if there is none. Raises RuntimeError if llama.cpp cannot make it."""
    path = folder / f"{precision}.gguf"
    if path.is_file():
        return path
    if precision == "f32":
        write_gguf(folder, path)
        return path
    import llama_cpp as api

    silence()
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_{QUANTIZED[precision]}")
    source = gguf_file(folder, "f32")
    if code := api.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        with suppress(FileNotFoundError):
            path.unlink()
        raise RuntimeError(f"llama_model_quantize to {precision} returned {code}")
    return path


def write_gguf(folder: Path, path: Path) -> None:
    """A model folder as an f32 GGUF file. (For your own models use llama.cpp's converter on dist/hf.)"""
    import gguf

    from gpt2.model.storage import load_folder
    from gpt2.tokenizer import END_OF_TEXT, vocabulary_files

    model = load_folder(folder)
    merges, vocabulary = vocabulary_files()
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(model.config.n_layer)
    writer.add_context_length(model.config.block_size)
    writer.add_embedding_length(model.config.n_embd)
    writer.add_feed_forward_length(4 * model.config.n_embd)
    writer.add_head_count(model.config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges.read_text(encoding="utf-8").split("\n")[1:-1])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            tensor_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(tensor_name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
