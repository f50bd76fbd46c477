"""Example inputs of a model's layers, on text that the model writes itself, so that rounding needs no other text."""

import torch
from torch import Tensor

from gpt2.model.transformer import GPT, Linear

EXAMPLES = 128  # tokens
ROUNDS = 2
SEED = 0


@torch.no_grad()
def example_inputs(model: GPT) -> dict[Tensor, Tensor]:
    """By weight, the inputs, (EXAMPLES, in), of the linear layers in the blocks. Empty if activations are not finite.

    The text starts as random tokens. In each round, all tokens but the first are sampled anew from the model's
    predictions for the text of the round before. Two rounds lose as little as training text does.
    """
    generator = torch.Generator(model.device).manual_seed(SEED)
    length = min(EXAMPLES, model.config.block_size)
    shape = (-(-EXAMPLES // length), length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)
    for _ in range(ROUNDS):
        totals = model(ids)[0].float().softmax(2).cumsum(2)  # (B, T, V)
        if not torch.isfinite(totals[:, :, -1]).all():
            return {}
        # by the inverse of the distribution function: an eighth of the time of torch.multinomial
        uniform = torch.rand((*shape, 1), generator=generator, device=model.device) * totals[:, :, -1:]
        sampled = torch.searchsorted(totals, uniform)[:, :-1, 0].clamp(max=model.config.vocab_size - 1)
        ids = torch.cat((ids[:, :1], sampled), 1)
    found: dict[Tensor, Tensor] = {}

    def keep(layer: Linear, arguments: tuple[Tensor, ...]) -> None:
        found[layer.weight] = arguments[0].flatten(0, -2)[:EXAMPLES]

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found if all(torch.isfinite(x).all() for x in found.values()) else {}
