"""The optimizer and its learning rate."""

import math

import torch
from torch import nn

from gpt2.config import TrainConfig


def lr_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

    It rises in equal parts to `learning_rate` at step warmup_steps, then falls along half a cosine (Loshchilov and
    Hutter, https://arxiv.org/abs/1608.03983) to `min_learning_rate` at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.max_steps - 1 - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / decay_steps) if decay_steps else 0.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and embeddings, which decay, and vectors (biases, LayerNorm), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) over the parameter groups of a model."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
