"""GPTQ as its paper's equations 2 and 3 have it, in float64: an input at a time, and no blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ffjax.formats import WeightFormat

__all__ = ["damped", "oracle_integers", "value_of"]


def damped(hessian: np.ndarray, dampening: float) -> np.ndarray:
    """H with a part of the mean of its diagonal added; 1 for an input that was 0 all along."""
    h = hessian.astype(np.float64)
    added = dampening * h.diagonal().mean()
    for i in range(len(h)):
        h[i, i] = h[i, i] + added if h[i, i] else 1.0
    return h


def _integer_of(weight: float, scale: np.ndarray, format: WeightFormat) -> int:
    """The stored integer whose value is nearest to a weight; scale [] or [2]."""
    if format.bits == 8:
        return int(np.clip(np.round(weight / scale), -127, 127)) if scale else 0
    if format.offset is None:
        return int(np.clip(np.round(weight / scale), -8, 7)) + 8 if scale else 8
    step, second = scale
    if format.offset == "zero":
        return int(np.clip(np.round(weight / step) + second, 0, 15)) if step else int(second)
    return int(np.clip(np.round((weight - second) / step), 0, 15)) if step else 0


def value_of(integer: float, scale: Any, format: WeightFormat) -> Any:
    """The weight that a stored integer stands for."""
    if format.offset == "zero":
        return (integer - scale[1]) * scale[0]
    if format.offset == "minimum":
        return integer * scale[0] + scale[1]
    return (integer - (8 if format.bits == 4 else 0)) * scale


def oracle_integers(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, format: WeightFormat, order: str
) -> tuple[np.ndarray, np.ndarray]:
    """The integers of a matrix whose scales are known.

    Args:
        weight: `[out, in]`.
        hessian: H, damped, `[in, in]`.
        scale: `[out, n]`, with a second number `[out, n, 2]`.
        format: what to round to.
        order: "stored", or "largest": by the diagonal of H.

    Returns:
        The integers as they are stored, `[out, in]`; and of each row how near it came to a tie,
        as a part of a scale: a row that came nearer than float32 can tell may go either way.
    """
    out, inputs = weight.shape
    size = format.group_size or inputs
    order_of = range(inputs)
    if order == "largest":
        order_of = np.argsort(-hessian.diagonal(), kind="stable")
    left, inverse = weight.astype(np.float64), np.linalg.inv(hessian)
    integers, tie = np.zeros((out, inputs), int), np.full(out, 1.0)
    for i in order_of:
        error = np.zeros(out)
        for o in range(out):
            of = scale[o, i // size]
            integers[o, i] = _integer_of(left[o, i], of, format)
            error[o] = left[o, i] - value_of(integers[o, i], of, format)
            step = abs(of if np.ndim(of) == 0 else of[0])
            if step:
                tie[o] = min(tie[o], abs(0.5 - abs(error[o]) / step))
        # Equation 2: what the others become. Equation 3: the inverse without input i.
        left -= np.outer(error, inverse[i] / inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return integers, tie
