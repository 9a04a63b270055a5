"""Finds the first layer, segment and buffer in which the kernel is not what the specification says.

Two launches: the whole step, which returns the residual after each of its layers, to find the
layer; then the step's layers up to that one, whose buffers are read and compared one by one. Of the
last layer, and of the head, the first launch has left all.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.spec.cached import new_rows
from pallas_kernels.spec.comparing import compare_head, compare_last_layer
from pallas_kernels.spec.cutting import first_layers, fresh
from pallas_kernels.spec.differences import (
    STEP_OF_BFLOAT16,
    STEP_OF_FLOAT32,
    WHOLE_LAYER,
    Difference,
    find,
    rms,
)
from pallas_kernels.spec.handed import as_residual
from pallas_kernels.spec.running import Run
from pallas_kernels.spec.step import cache_has_room, expected_embed, expected_layer
from pallas_kernels.stream.launch import StepResult
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["bisect", "compare_layer"]


def bisect(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    run: Run,
    *,
    every_layer: bool = False,
) -> Difference | None:
    """The first difference that rounding does not explain; None if there is none.

    Args:
        plan: the step's.
        weights: the weights, as the model stores them.
        state: the cache. It stays as it is.
        tokens: int32 `[B * T]`.
        run: runs the kernel: `running.compiled`, `running.interpreted`, or
            `pallas_kernels.stream.stages.run_stages`.
        every_layer: look into every layer, which compiles and launches a step for each. Without
            it, only into the first one after which the residual, or whose keys and values, differ
            by more than the rounding of a whole layer: of many hidden activations, one that is a
            little wrong does not show there.

    Returns:
        The difference, which says in sentences where it is. If a layer as a whole differs and, run
        again as the last one of a shorter step, none of its segments does, `segment` is None.
    """
    layers = plan.dims.num_layers
    result = run(plan, weights, state, tokens, hidden_layers=tuple(range(layers + 1)))
    assert result.hidden is not None
    hidden = [result.hidden[:, n] for n in range(layers + 1)]
    for layer in range(layers):
        last = (hidden[layer], hidden[layer + 1])
        found = _differs(plan, weights, state, tokens, result, layer, last)
        if layer == layers - 1:  # all of it lies there
            within = compare_last_layer(plan, plan, weights, state, tokens, result, last)
            if (first := next(within, None)) is not None:
                return first
        if found is None and not every_layer:
            continue
        if layer < layers - 1:
            first = compare_layer(plan, weights, state, tokens, run, layer)
            if first is not None:
                return first
        if found is None:
            continue
        note = (
            "Its segments by themselves differ by no more than rounding when the layer is run as "
            "the last one of a shorter step, from a fresh exchange: so it depends on the number of "
            "layers, on what earlier steps have left in the exchange, or on time."
        )
        return dataclasses.replace(found, segment=None, note=note)
    return next(compare_head(plan, weights, state, result), None)


def compare_layer(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    run: Run,
    layer: int,
) -> Difference | None:
    """The first difference within a layer, by a step that ends after it; None if there is none.

    Args: see `bisect`.
    """
    cut, begin = first_layers(plan, layer + 1), fresh(state)
    result = run(cut, weights, begin, tokens, hidden_layers=(layer, layer + 1))
    assert result.hidden is not None
    hidden = result.hidden[:, 0], result.hidden[:, 1]
    return next(compare_last_layer(plan, cut, weights, begin, tokens, result, hidden), None)


def _differs(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    result: StepResult,
    layer: int,
    hidden: tuple[Array, Array],
) -> Difference | None:
    """Whether a layer as a whole differs: the residual after it, or its new keys and values."""
    lengths = jnp.maximum(state.lengths, 0)
    room = np.asarray(cache_has_room(plan, lengths))
    if layer == 0:
        want = expected_embed(plan)(weights, tokens)["residual"]
        wrong = find(plan, 0, "embed", "residual", hidden[0], want, 0, compared=room)
        if wrong is not None:
            return wrong
    # NaN of a token without room would be that of the sequence's others: 0 * NaN is NaN.
    entering = jnp.where(room[:, None], hidden[0], 0.0)
    given = {"residual": entering, "x_in": as_residual(plan, entering)}
    number = jnp.int32(layer)
    made = expected_layer(plan)(weights, number, lengths, state.k, state.v, given)
    want = {name: np.asarray(made[name]).astype(np.float32) for name in ("residual_out", "k", "v")}
    added = np.asarray(made["attn_added"]), np.asarray(made["ffw_added"])
    step = {"k": STEP_OF_BFLOAT16, "v": STEP_OF_BFLOAT16, "residual_out": STEP_OF_FLOAT32}
    size = {"k": rms(want["k"]), "v": rms(want["v"]), "residual_out": sum(map(rms, added))}
    got = {
        "k": new_rows(plan, layer, lengths, result.state.k),
        "v": new_rows(plan, layer, lengths, result.state.v),
        "residual_out": hidden[1],
    }
    for name, segment in (("k", "qkv"), ("v", "qkv"), ("residual_out", "down")):
        allowed = step[name] * np.abs(want[name]) + WHOLE_LAYER * size[name]
        wrong = find(
            plan, layer, segment, name, np.asarray(got[name]), want[name], allowed, compared=room
        )
        if wrong is not None:
            return wrong
    return None
