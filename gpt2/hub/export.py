"""Exports: a Hugging Face folder, and gpt_model.pt with gpt_config.pt for a Space."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import FileError
from gpt2.files import atomic_save, write_json
from gpt2.model.hugging_face import swap_conv1d_layout
from gpt2.model.transformer import GPT
from gpt2.tokenizer import END_OF_TEXT, vocabulary_files

SPACE_WEIGHTS = "gpt_model.pt"
SPACE_CONFIG = "gpt_config.pt"
VERIFIED_TOKENS = 64
LOGITS_TOLERANCE = 1e-4


def save_space_model(model: GPT, folder: Path) -> None:
    """Writes gpt_model.pt, a state dict, and gpt_config.pt, a dict of the five sizes, without pickled classes."""
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    atomic_save(folder / SPACE_WEIGHTS, lambda path: torch.save(weights, path))
    atomic_save(folder / SPACE_CONFIG, lambda path: torch.save(model.config.to_dict(), path))


def hugging_face_config(config: GPTConfig) -> dict[str, Any]:
    """The config.json of `transformers` for a model of these sizes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "dtype": "float32",
    }


def save_pretrained(model: GPT, folder: Path) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load without a network."""
    ours = {name: weight.detach().cpu() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    weights: dict[str, Tensor] = swap_conv1d_layout(ours)
    atomic_save(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_json(folder / "config.json", hugging_face_config(model.config))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "do_sample": True},
    )
    end_of_text = "<|endoftext|>"
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.config.block_size,
            "add_prefix_space": False,
            "bos_token": end_of_text,
            "eos_token": end_of_text,
            "unk_token": end_of_text,
        },
    )
    merges, vocabulary = vocabulary_files()
    shutil.copyfile(merges, folder / "merges.txt")
    write_json(folder / "vocab.json", json.loads(vocabulary.read_text(encoding="utf-8")))


def verify_logits(model: GPT, exported: Callable[[Tensor], Tensor], name: str) -> float:
    """Compares the logits of an exported model with those of `model`. Returns the largest absolute difference.

    exported: returns logits, (1, T, V), of token ids, (1, T). Raises FileError if the difference is over
    LOGITS_TOLERANCE or not finite.
    """
    tokens = torch.arange(min(VERIFIED_TOKENS, model.config.block_size))[None]
    with torch.inference_mode():
        difference = float((model(tokens)[0].float().cpu() - exported(tokens).float().cpu()).abs().max())
    if not difference <= LOGITS_TOLERANCE:
        raise FileError(f"the logits of {name} differ from the trained model's by {difference:.3g}")
    return difference
