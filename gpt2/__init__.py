"""Train and use GPT-2.

    from gpt2 import Engine, Request, Sampling, load_model

Names are imported on first use, so that `python -m gpt2 --help` and the checks of a configuration need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.config import GPTConfig
    from gpt2.inference.engine import Engine
    from gpt2.inference.quantization import fastest_dtype, quantize
    from gpt2.inference.request import Request, Sampling
    from gpt2.model.storage import load_model
    from gpt2.model.transformer import GPT

__all__ = ["GPT", "Engine", "GPTConfig", "Request", "Sampling", "fastest_dtype", "load_model", "quantize"]
__version__ = "0.2.0"

_MODULES = {
    "GPT": "gpt2.model.transformer",
    "GPTConfig": "gpt2.config",
    "Engine": "gpt2.inference.engine",
    "Request": "gpt2.inference.request",
    "Sampling": "gpt2.inference.request",
    "fastest_dtype": "gpt2.inference.quantization",
    "load_model": "gpt2.model.storage",
    "quantize": "gpt2.inference.quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
