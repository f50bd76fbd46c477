"""Loads the model files of a Space, which may be missing, damaged or malicious.

It never executes their content, and never unpacks more bytes than the configuration allows.
"""

import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt2.config import GPTConfig
from gpt2.errors import FileError, UserError
from gpt2.files import sha256_of
from gpt2.model.transformer import GPT

WEIGHTS, CONFIG, MANIFEST = "gpt_model.pt", "gpt_config.pt", "manifest.json"
EXPORT_AGAIN = "Export or upload it again"
MAX_SMALL_FILE_BYTES = 4_000_000
MAX_OVERHEAD_BYTES = 4_000_000  # names and directories of an archive of tensors
MAX_LAYERS = 1000
TEXT, NUMBER = (str,), (int, float)
METADATA: Mapping[str, tuple[type, ...]] = {
    "title": TEXT,
    "examples": (list,),
    "parameters": NUMBER,
    "n_layer": NUMBER,
    "n_head": NUMBER,
    "n_embd": NUMBER,
    "context": (int,),
    "corpus": TEXT,
    "corpus_characters": NUMBER,
    "fallback_reason": (str, type(None)),
    "steps": NUMBER,
    "tokens": NUMBER,
    "validation_loss": NUMBER,
    "perplexity": NUMBER,
    "bits_per_byte": NUMBER,
    "mlflow_run_id": (str, type(None)),
    "git_commit": (str, type(None)),
    "dtype_losses": (dict,),
    "target": TEXT,
}
"""Required entries of manifest.json about the model, and their types."""


def load_metadata(folder: Path) -> dict[str, Any]:
    """The model metadata in manifest.json. Raises FileError if a file is missing or is not the exported one."""
    try:
        if (folder / MANIFEST).stat().st_size > MAX_SMALL_FILE_BYTES:
            raise FileError(f"{MANIFEST} is too large. {EXPORT_AGAIN}")
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        metadata: dict[str, Any] = manifest["model"]
        for name in (WEIGHTS, CONFIG):
            if sha256_of(folder / name) != manifest["sha256"][name]:
                raise FileError(f"{name} is damaged: it is not the file that was exported. {EXPORT_AGAIN}")
        for name, types in METADATA.items():
            value = metadata[name]
            if not isinstance(value, types) or isinstance(value, bool) or not _is_finite(value):
                raise FileError(f"{MANIFEST} says {name} is {str(value)[:40]!r}. {EXPORT_AGAIN}")
        if metadata["context"] < 1 or not all(
            type(loss) is float and _is_finite(loss) for loss in metadata["dtype_losses"].values()
        ):
            raise FileError(f"{MANIFEST} has no context length or no losses. {EXPORT_AGAIN}")
        if not metadata["examples"] or not all(isinstance(example, str) for example in metadata["examples"]):
            raise FileError(f"{MANIFEST} has no examples. {EXPORT_AGAIN}")
    except FileNotFoundError as error:
        raise FileError(f"{Path(error.filename).name} is missing. {EXPORT_AGAIN}") from None
    except KeyError as error:
        raise FileError(f"{MANIFEST} lacks {error}. {EXPORT_AGAIN}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FileError(f"{MANIFEST} cannot be read ({str(error)[:200]}). {EXPORT_AGAIN}") from None
    return metadata


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def load_model(folder: Path) -> GPT:
    """The model of this folder, on the CPU. Raises FileError if its files cannot be loaded or do not fit."""
    try:
        sizes = _tensors(folder / CONFIG, MAX_SMALL_FILE_BYTES)
        config = GPTConfig.from_dict(sizes)
        if config.n_layer > MAX_LAYERS:
            raise FileError(f"{CONFIG} has n_layer {config.n_layer}; expected at most {MAX_LAYERS}")
        expected_bytes = 4 * config.num_parameters()
        if (folder / WEIGHTS).stat().st_size < expected_bytes:
            raise FileError(f"{WEIGHTS} is too small for the sizes in {CONFIG}")
        weights = _tensors(folder / WEIGHTS, expected_bytes + MAX_OVERHEAD_BYTES)
        if not isinstance(weights, dict):
            raise FileError(f"{WEIGHTS} contains no weights")
        with torch.device("meta"), _WithoutInit():
            model = GPT(config)
        for name, expected in model.state_dict().items():
            _check(name, weights.get(name), expected)
        model.load_state_dict(weights, assign=True)
    except (FileError, UserError) as error:
        raise FileError(f"The model cannot be loaded: {error}. {EXPORT_AGAIN}") from None
    except FileNotFoundError as error:
        raise FileError(f"{Path(error.filename).name} is missing. {EXPORT_AGAIN}") from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise FileError(f"The model cannot be loaded: {' '.join(str(error).split())[:300]}. {EXPORT_AGAIN}") from None
    model.transformer["wte"].weight = model.lm_head.weight  # tied
    return model.requires_grad_(False).eval()


class _WithoutInit(TorchFunctionMode):
    """Leaves weights as they are. Initialising them without memory would import torch's compiler, for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch.overrides describes it."""
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _tensors(path: Path, limit_bytes: int) -> Any:
    """The content of a file of torch.save. Raises FileError if it unpacks to more than limit_bytes."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > limit_bytes:
            raise FileError(f"{path.name} unpacks to more than {limit_bytes:,} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check(name: str, weight: Any, expected: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.is_quantized:
        raise FileError(f"{WEIGHTS} has no tensor {name}")
    if weight.shape != expected.shape or weight.dtype != torch.float32:
        raise FileError(f"{name} is {weight.dtype} of {tuple(weight.shape)} and not of {tuple(expected.shape)}")
    if weight.numel() and not all(math.isfinite(extreme) for extreme in weight.aminmax()):
        raise FileError(f"{name} has non-finite values")
