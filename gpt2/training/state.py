"""The state of a training run, and the content of its checkpoints."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt2.config import TrainConfig
from gpt2.errors import FileError
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.world import ALONE, World

LogRow = dict[str, float | int | None]
Weights = dict[str, Tensor]
FORMAT_VERSION = 3
INITIAL_LOSS_SCALE = {"float16": 2.0**16}
THROUGHPUT_WINDOW_STEPS = 20


@dataclass
class TrainState:
    """Everything a checkpoint needs besides weights and optimizer.

    precision: dtype of the matrix products, "float32", "bfloat16" or "float16". micro_batch_size: sequences in one
    forward and backward pass; less than the configured batch_size if memory is short. compiled: whether the model
    is compiled. step: completed optimizer steps. best_val_loss: infinite before the first evaluation. best_weights:
    the weights with that loss, on the CPU. train_sample_loss: of the last weights on a sample of the training text, at
    the end of the run. history: rows logged so far. pending_row: the row of the last step if the run stopped before its
    evaluation was complete. elapsed_s: training time over all sessions of the run, which
    includes data_s (waiting for batches) and log_s (callbacks); save_s: time spent on checkpoints, not included.
    loss_scale: factor of the loss in float16, so that small gradients do not underflow. steps_since_overflow: steps
    at the current loss scale.
    """

    precision: str
    micro_batch_size: int
    compiled: bool = False
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    train_sample_loss: float | None = None
    elapsed_s: float = 0.0
    data_s: float = 0.0
    log_s: float = 0.0
    save_s: float = 0.0
    loss_scale: float = 1.0
    steps_since_overflow: int = 0
    pending_row: LogRow | None = None
    history: list[LogRow] = field(default_factory=list)
    best_weights: Weights = field(default_factory=dict)

    @classmethod
    def initial(cls, precision: torch.dtype, micro_batch_size: int) -> "TrainState":
        """The state of a new run."""
        name = str(precision).removeprefix("torch.")
        return cls(name, micro_batch_size, loss_scale=INITIAL_LOSS_SCALE.get(name, 1.0))

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as a torch.dtype."""
        dtype = getattr(torch, self.precision)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def is_last_step(self, config: TrainConfig) -> bool:
        """Whether no step follows this one, after its evaluation: the last one, or that of early stopping."""
        evaluations = self.step // config.eval_interval - self.best_step // config.eval_interval
        return self.step == config.max_steps or (config.patience is not None and evaluations >= config.patience)

    def is_complete(self, config: TrainConfig) -> bool:
        """Whether the run has ended, with all evaluations."""
        return self.pending_row is None and self.is_last_step(config)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes to the field `name`."""
        start_s = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start_s)


class ThroughputMeter:
    """Tokens per second over the last steps; time outside of steps does not count."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.tokens_per_s = 0.0
        self._step_s: deque[float] = deque(maxlen=THROUGHPUT_WINDOW_STEPS)
        self._start_s = time.perf_counter()

    def restart(self) -> float:
        """Starts timing the next step now. Returns the seconds since the last start."""
        now_s = time.perf_counter()
        elapsed_s, self._start_s = now_s - self._start_s, now_s
        return elapsed_s

    def step(self) -> float:
        """Counts a step. Returns its seconds."""
        elapsed_s = self.restart()
        self._step_s.append(elapsed_s)
        self.tokens_per_s = len(self._step_s) * self.tokens_per_step / max(sum(self._step_s), 1e-9)
        return elapsed_s


def checkpoint_content(model: GPT, optimizer: Optimizer, state: TrainState, world: World = ALONE) -> dict[str, Any]:
    """The content of a checkpoint: only plain values and tensors, for `torch.load(..., weights_only=True)`."""
    plain = {name: value for name, value in vars(state).items() if name != "best_weights"}
    return {
        "format_version": FORMAT_VERSION,
        "config": model.config.to_dict(),
        "model_state_dict": model.state_dict(),
        "best_model_state_dict": {} if state.best_step == state.step else state.best_weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "state": {**plain, "history": list(state.history)},
        "generators": _generator_states(model.device),
        "environment": environment(model, world),
    }


def restore_checkpoint(content: dict[str, Any], model: GPT, optimizer: Optimizer) -> TrainState:
    """Loads a checkpoint into model, optimizer and random generators. Returns the state to continue from.

    Raises FileError if another version of this program wrote it.
    """
    state = restore_state(content, model.device)
    model.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    if state.best_step:
        state.best_weights = content["best_model_state_dict"] or copy_weights(model)
    return state


def restore_state(content: dict[str, Any], device: torch.device) -> TrainState:
    """The part of `restore_checkpoint` without weights and optimizer."""
    if content.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"the checkpoint has format {content.get('format_version')!r}, and this version reads {FORMAT_VERSION}; "
            "continue with the version that wrote it, or delete its folder to start a new run"
        )
    torch.set_rng_state(content["generators"]["cpu"])
    if device.type == "cuda" and "cuda" in content["generators"]:
        torch.cuda.set_rng_state(content["generators"]["cuda"], device)
    return TrainState(**content["state"])


def environment(model: GPT, world: World = ALONE) -> dict[str, Any]:
    """What bitwise results depend on, besides params, data and code."""
    is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "world size": world.size,
        **({"strategy": "fsdp" if is_sharded else "ddp"} if world.size > 1 else {}),
    }


def copy_weights(model: GPT) -> Weights:
    """A copy of all parameters on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
