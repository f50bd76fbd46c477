"""The learning rate schedule."""

import math

from gpt2.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up to `learning_rate` at step warmup_steps, then decay to `min_learning_rate` at the last step: along
    half a cosine (https://arxiv.org/abs/1608.03983), linearly, or, with "wsd", linearly over the last decay_fraction
    of the steps (https://arxiv.org/abs/2404.06395).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    last_step, decay_start = config.max_steps - 1, config.warmup_steps
    if config.schedule == "wsd":
        decay_start = max(decay_start, last_step - round(config.decay_fraction * config.max_steps))
    decay_steps = last_step - decay_start
    progress = min(1.0, max(0, step - decay_start) / decay_steps) if decay_steps else 0.0
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_learning_rate + remaining * (config.learning_rate - config.min_learning_rate)
