"""Injection of non-finite values into losses, gradients and weights."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import torch

from gpt2.errors import DivergedError
from tests.faults.result import Result
from tests.faults.small import Session

VALUES = (math.nan, math.inf, -math.inf)
PLACES = ("loss", "one gradient", "all gradients", "weight after the update", "moment after the update")


class Poison:
    """Injects a value into a place of a session in one step, counted from 0."""

    def __init__(self, session: Session, place: str, value: float, step: int, draw: random.Random) -> None:
        self.place, self.value, self.step, self.session = place, value, step, session
        self.parameter = draw.choice(list(session.model.parameters()))
        self.index = draw.randrange(self.parameter.numel())
        self.applied: list[int] = []
        self._loss, self._update = session.compute.loss, session.optimizer.step
        session.compute.loss = self.loss
        session.optimizer.step = self.update
        self._clip = torch.nn.utils.clip_grad_norm_

    @property
    def is_now(self) -> bool:
        return self.session.state.step == self.step

    def loss(self, inputs: Any, targets: Any, **options: Any) -> torch.Tensor:
        loss = self._loss(inputs, targets, **options)
        return loss * self.value if self.is_now and self.place == "loss" and torch.is_grad_enabled() else loss

    def __enter__(self) -> None:
        torch.nn.utils.clip_grad_norm_ = self.clip

    def __exit__(self, *_: object) -> None:
        torch.nn.utils.clip_grad_norm_ = self._clip

    def clip(self, parameters: Any, max_norm: float) -> torch.Tensor:
        """Replaces clip_grad_norm_, which runs after all gradients are computed."""
        if self.is_now and self.place == "one gradient":
            self.parameter.grad.view(-1)[self.index] = self.value
        if self.is_now and self.place == "all gradients":
            for parameter in self.session.model.parameters():
                parameter.grad.fill_(self.value)
        return self._clip(parameters, max_norm)

    def update(self) -> None:
        self.applied.append(self.session.state.step)
        self._update()
        if self.is_now and self.place == "weight after the update":
            self.parameter.data.view(-1)[self.index] = self.value
        if self.is_now and self.place == "moment after the update":
            for part in self.session.optimizer.parts.values():
                for kept in part.state.values():
                    kept.get("exp_avg", kept.get("momentum_buffer")).view(-1)[0] = self.value


def poisoned_checkpoints(session: Session) -> list[str]:
    """The checkpoints with non-finite values."""
    found = []
    for step in session.store.steps():
        content = session.store.load(step)
        tensors = [*content["model_state_dict"].values(), *content["best_model_state_dict"].values()]
        states = content["optimizer_state_dict"]
        for state in states.values() if "muon" in states else [states]:
            tensors += [value for kept in state["state"].values() for value in kept.values()]
        if not all(torch.as_tensor(tensor).isfinite().all() for tensor in tensors):
            found.append(str(step))
    return found


def non_finite(folder: Path, cases: int, seed: int = 0) -> Result:
    """Each case must end with exit code 3, without an update by such a gradient or a checkpoint with the value."""
    draw = random.Random(seed)
    kinds = itertools.cycle(itertools.product(PLACES, VALUES, ("adamw", "muon"), (torch.float32, torch.bfloat16)))
    result = Result("non-finite injections")
    for number, (place, value, optimizer, precision) in zip(range(cases), kinds, strict=False):
        step = draw.randrange(5)
        session = Session(folder / str(number), precision=precision, optimizer=optimizer, max_steps=6)
        poison = Poison(session, place, value, step, draw)
        problem = "no divergence was detected"
        try:
            with poison:
                session.train()
        except DivergedError as error:
            problem = None if error.exit_code == 3 and "\n" not in str(error) else f"bad message: {error}"
        if place in PLACES[:3] and step in poison.applied:
            problem = "the update was applied"
        if bad := poisoned_checkpoints(session):
            problem = f"poisoned checkpoints {bad}"
        if session.store.load_newest(lambda _: None) is None and step > 0:
            problem = "there is no good checkpoint"
        result.add(problem and f"{place}, {value}, step {step + 1}, {optimizer}, {precision}: {problem}")
    return result
