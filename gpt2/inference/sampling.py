"""Sampling of the next token from logits: repetition penalty, temperature, top-k, top-p."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.inference.request import Sampling

TOP_P_CANDIDATES = (64, 1024)
"""top-p first tries this many of the likeliest tokens: sorting the whole vocabulary takes milliseconds."""


def apply_repetition_penalty(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Logits, (V,), with the repetition penalty applied to the token ids in `seen`."""
    if penalty == 1:
        return logits
    ids = torch.tensor([i for i in set(seen) if i < logits.numel()], device=logits.device)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def candidate_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities (K,) to sample from, given logits (V,), and their token ids (K,), or None for 0 to V - 1.

    Ids beyond GPT-2's tokens, which a padded vocabulary has, are never candidates.
    """
    logits = logits[:GPT2_VOCAB_SIZE].float()
    if sampling.temperature == 0:
        return torch.ones(1, device=logits.device), logits.max(0).indices[None]
    ids = None
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits, ids = logits.topk(sampling.top_k)  # first, so that all else runs on k logits
    logits = logits / sampling.temperature
    probs = logits.softmax(0)
    if sampling.top_p is None or sampling.top_p == 1:
        return probs, ids
    for count in (*TOP_P_CANDIDATES, probs.numel()):
        if count > probs.numel():
            continue
        likeliest, order = probs.topk(count) if ids is None else (probs, ids)  # top_k has sorted them
        before = likeliest.double().cumsum(0) - likeliest  # total probability of the likelier tokens
        if len(likeliest) == probs.numel() or before[-1] >= sampling.top_p:
            kept = int((before < sampling.top_p).sum())
            return likeliest[:kept] / likeliest[:kept].sum(), order[:kept]
    raise AssertionError("the last count covers the whole vocabulary")


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id of the next token, given logits (V,).

    Sampled by exponential races (the Gumbel-max trick, https://arxiv.org/abs/1411.0030): the argmax of p / Exp(1).
    Rounding differences in the probabilities hardly ever change it.
    """
    probs, ids = candidate_tokens(logits, sampling)
    index = 0
    if probs.numel() > 1:
        # -log(1 - uniform) is Exp(1), in a third of the time of exponential_
        uniform = torch.rand(probs.numel(), dtype=torch.double, generator=generator)
        index = int((probs / uniform.neg_().log1p_().neg_()).argmax())
    return index if ids is None else int(ids[index])
