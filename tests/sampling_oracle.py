"""What numpy makes of sampling parameters, in float64 and token by token."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ffjax.sampling.params import SamplingParams

__all__ = ["edited", "kept", "probabilities"]


def edited(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    stops: Sequence[int] = (),
) -> np.ndarray:
    """Logits `[V]` after biases, forbidden tokens and penalties."""
    out = np.array(logits, np.float64)
    for token, bias in dict(params.logit_bias).items():
        out[token] += bias
    for token in params.bad_token_ids:
        out[token] = -np.inf
    if len(answer) < params.min_tokens:
        out[[*stops]] = -np.inf
    for token in {*prompt, *answer}:
        r = params.repetition_penalty
        out[token] = out[token] / r if out[token] > 0 else out[token] * r
    for token, count in Counter(answer).items():
        out[token] -= params.presence_penalty + params.frequency_penalty * count
    return out


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens may be drawn, bool `[V]`: each filter by its definition, token by token."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    keep = np.ones(len(logits), bool)
    if params.top_k:
        keep &= np.array([(logits > one).sum() < params.top_k for one in logits])
    within = np.where(keep, weights, 0)
    above = np.array([within[logits > one].sum() for one in logits])
    if params.top_p < 1:
        keep &= above < params.top_p * within.sum()
    return keep & (weights >= params.min_p)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Of each token, float64 `[V]`."""
    weights = np.exp((logits - logits.max()) / params.temperature) * kept(logits, params)
    return weights / weights.sum()
