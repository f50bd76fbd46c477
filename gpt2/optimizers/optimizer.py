"""The optimizer of a run: AdamW, or Muon with AdamW."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import TrainConfig
from gpt2.optimizers.muon import Muon


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and embeddings; none for vectors (biases, LayerNorm)."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains a parameter: the matrices of the blocks, not embeddings and head."""
    return ".h." in name and parameter.dim() == 2


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), or Muon (https://kellerjordan.github.io/posts/muon/) with AdamW.

    Muon has its own learning rate, and the same weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        muon_type: Callable[..., torch.optim.Optimizer] = Muon,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """muon_type: Muon, or one that computes the same in several processes. dtype: of the matrix products."""
        self.config = config
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        muon: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in trained.items():
            (muon if config.optimizer == "muon" and is_hidden_matrix(name, parameter) else rest).append(parameter)
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                parameter_groups(rest, config.weight_decay),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                fused=True,
            )
        }
        if muon:
            self.parts["muon"] = muon_type(
                muon,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                # float16 has too small a range
                dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            )

    def tensors(self) -> Iterator[Tensor]:
        """The optimizer state, mostly moments."""
        for part in self.parts.values():
            for kept in part.state.values():
                yield from (value for value in kept.values() if isinstance(value, Tensor))

    def named_tensors(self) -> dict[str, Tensor]:
        """The optimizer state, by part, parameter and moment: "adamw.transformer.wte.weight.exp_avg"."""
        return {
            f"{part}.{self.names[parameter]}.{key}": value
            for part, optimizer in self.parts.items()
            for parameter, kept in optimizer.state.items()
            for key, value in kept.items()
        }

    def names_of(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """What `state_dict` returned, by the names of `named_tensors`."""
        return {
            f"{part}.{self.names[parameters[index]]}.{key}": value
            for part, optimizer in self.parts.items()
            for parameters in [[p for group in optimizer.param_groups for p in group["params"]]]
            for index, kept in self._by_part(state_dict)[part]["state"].items()
            for key, value in kept.items()
        }

    def initialize_state(self) -> None:
        """Allocates the state that the first step would, to load into it. Leaves the parameters as they are."""
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        self.step()
        self.zero_grad()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of AdamW, and scales that of Muon by the same factor of its peak."""
        highest = {"adamw": self.config.learning_rate, "muon": self.config.muon_learning_rate}
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = highest[name] * (learning_rate / self.config.learning_rate)

    def step(self) -> None:
        """One update of all parameters."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict of AdamW; with Muon, a state dict for each optimizer."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return states if len(states) > 1 else states["adamw"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(self._by_part(state_dict)[name])

    def _by_part(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict if len(self.parts) > 1 else {"adamw": state_dict}
