"""The last layer of a step, and its head, segment by segment against the specification.

Each segment is computed from what the kernel itself has handed to it. So nothing that a segment
gets wrong, and no rounding, shows in a later one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.spec.cached import compare_cache
from pallas_kernels.spec.differences import (
    COMPUTED,
    STEP_OF_BFLOAT16,
    STEP_OF_FLOAT32,
    Difference,
    find,
    rms,
    step_of_residual,
    steps,
)
from pallas_kernels.spec.handed import as_residual
from pallas_kernels.spec.reading import Handed, read_exchange
from pallas_kernels.spec.segments import splits_there
from pallas_kernels.spec.step import (
    cache_has_room,
    expected_embed,
    expected_head,
    expected_layer,
)
from pallas_kernels.stream.launch import StepResult
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["compare_head", "compare_last_layer"]

# Where the logarithm of a KV split's sum of weights may lie, in base 2.
_LOGARITHM = 5e-3
# What is handed over between the segments of a layer.
_GIVEN = ("qkv", "parts", "attn", "attn_block", "x_mid", "ffw", "partial", "ffw_block")


def compare_last_layer(
    plan: StreamPlan,
    ran: StreamPlan,
    weights: DecodeWeights,
    before: StepState,
    tokens: Array,
    result: StepResult,
    hidden: tuple[Array, Array] | None = None,
) -> Iterator[Difference]:
    """Differences of the last layer that a step has computed, in the order of its segments.

    Args:
        plan: the whole step's.
        ran: the plan that the kernel ran: the same, or one of fewer layers.
        weights: what the kernel should have been given.
        before: the cache before the step.
        tokens: int32 `[B * T]`.
        result: what the kernel has made.
        hidden: the residual that enters the layer, and the one behind it, as the step returns
            them: float32 `[C, D]` each. None: known as they were handed over alone.
    """
    number, lengths = ran.dims.num_layers - 1, jnp.maximum(before.lengths, 0)
    room = np.asarray(cache_has_room(plan, lengths))
    start = int(before.counters[0])
    handed = read_exchange(ran, np.asarray(result.state.counters), start)
    look = functools.partial(_look, plan, number, handed, room)
    entering = jnp.asarray(handed["x_in"].values)
    if hidden is not None:
        entering = hidden[0]
    owned, by = (None if hidden is None else hidden[0]), "down"
    if number == 0:
        by, embedded = "embed", expected_embed(plan)(weights, tokens)["residual"]
        if owned is not None:
            yield from _if(find(plan, 0, by, "residual", owned, embedded, 0, compared=room))
        owned = embedded
    if owned is not None:
        yield from _if(_handed_by_owner(plan, number, by, "x_in", handed, owned, room))
    given = {name: jnp.asarray(handed[name].values) for name in _GIVEN if name in handed}
    given |= {"residual": entering, "x_in": jnp.asarray(handed["x_in"].values)}
    layer = jnp.int32(number)
    made = expected_layer(plan)(weights, layer, lengths, before.k, before.v, given)
    want = {name: np.asarray(x) for name, x in made.items()}
    yield from look("qkv", "qkv", want["qkv"], COMPUTED * rms(want["qkv"]), _steps_of_qkv(plan))
    yield from compare_cache(plan, number, lengths, before, result.state, want, room)
    yield from _compare_parts(plan, layer, lengths, handed["parts"], want["parts"], room)
    heads = want["attn"].reshape(plan.dims.columns, plan.dims.num_heads, -1)
    of_head = np.broadcast_to(COMPUTED * rms(heads), heads.shape).reshape(want["attn"].shape)
    yield from look("attention", "attn", want["attn"], of_head)
    for segment, block in (("attn_out", "attn_block"), ("down", "ffw_block")):
        added = "attn_added" if segment == "attn_out" else "ffw_added"
        if segment == "down":
            for name in ("ffw", "ffw_copy"):
                if name in handed:
                    yield from look("gate_up", name, want["ffw"], COMPUTED * rms(want["ffw"]))
            if "partial" in handed:
                sums = COMPUTED * rms(want["partial"].swapaxes(1, 2)).swapaxes(1, 2)
                yield from look(segment, "partial", want["partial"], sums)
        if block in handed:
            yield from look(segment, block, want[block], COMPUTED * rms(want[block]))
        # Where the owners' float32 is not known, it is what was handed over, or a step beside it.
        unknown = 0 if hidden is not None else step_of_residual(plan) * np.abs(want["residual"])
        more = COMPUTED * rms(want[added]) + unknown
        if segment == "attn_out":
            yield from look(segment, "x_mid", want["x_mid"], more)
        elif hidden is None:
            yield from look(segment, "x_out", want["x_out"], more)
        else:
            yield from _compare_residual(plan, number, hidden[1], want, more, room)
            owned = hidden[1]
            yield from _if(_handed_by_owner(plan, number, segment, "x_out", handed, owned, room))


def compare_head(
    plan: StreamPlan,
    weights: DecodeWeights,
    before: StepState,
    result: StepResult,
) -> Iterator[Difference]:
    """Differences of the head behind all layers: logits, the programs' best ones, the tokens."""
    d, lengths = plan.dims, jnp.maximum(before.lengths, 0)
    start = int(before.counters[0])
    handed = read_exchange(plan, np.asarray(result.state.counters), start)
    x_head = jnp.asarray(handed["x_out"].values)
    made = expected_head(plan)(weights, lengths, x_head, result.logits)
    want = {name: np.asarray(x) for name, x in made.items()}
    close = functools.partial(find, plan, d.num_layers, "head")
    logits = want["logits"]
    yield from _if(close("logits", result.logits, logits, COMPUTED * rms(logits)))
    for name in ("best", "best_token"):
        found = handed[name]
        got, wanted, there = (np.swapaxes(x, 0, 1) for x in (found.values, want[name], found.there))
        has_one = np.isfinite(np.swapaxes(want["best"], 0, 1)) | ~there
        yield from _if(close(name, got, wanted, 0, there=there, compared=has_one))
    yield from _if(close("token", result.token, want["token"], 0))
    grown = np.repeat(np.asarray(result.state.lengths), d.tokens)
    wanted = np.repeat(np.asarray(lengths) + d.tokens, d.tokens)
    yield from _if(close("lengths", grown, wanted, 0))


def _if(found: Difference | None) -> Iterator[Difference]:
    if found is not None:
        yield found


def _look(
    plan: StreamPlan,
    layer: int,
    handed: dict[str, Handed],
    room: np.ndarray,
    segment: str,
    buffer: str,
    want: np.ndarray | Array,
    more: np.ndarray | float,
    step: np.ndarray | float | None = None,
) -> Iterator[Difference]:
    """A buffer, within a step of its form and `more`."""
    found, want = handed[buffer], np.asarray(want)
    step = steps(plan).get(buffer, 0.0) if step is None else step
    # Where half2 counts steps, near 0, they are of 2^-18.
    least = 2.0**-18 if plan.half2 else 0.0
    allowed = step * np.abs(want) + least + more
    yield from _if(
        find(
            plan, layer, segment, buffer, found.values, want, allowed,
            there=found.there, compared=room,
        )
    )  # fmt: skip


def _steps_of_qkv(plan: StreamPlan) -> np.ndarray:
    """Of each head, `[1, N + 2K, 1]`: keys and values are bfloat16, but keys that are normed."""
    d = plan.dims
    of_keys = STEP_OF_BFLOAT16 if d.features.qk_norm is None else 2.0**-15
    steps = [2.0**-15] * d.num_heads + [of_keys] * d.num_kv_heads
    return np.array(steps + [STEP_OF_BFLOAT16] * d.num_kv_heads)[:, None]


def _handed_by_owner(
    plan: StreamPlan,
    layer: int,
    segment: str,
    buffer: str,
    handed: dict[str, Handed],
    owned: Array,
    room: np.ndarray,
) -> Difference | None:
    """The residual as it was handed over, which is the owners' rounded and nothing else."""
    found, want = handed[buffer], as_residual(plan, owned)
    return find(
        plan, layer, segment, buffer, found.values, want, 0, there=found.there, compared=room
    )


def _compare_parts(
    plan: StreamPlan,
    layer: Array,
    lengths: Array,
    found: Handed,
    want: np.ndarray,
    room: np.ndarray,
) -> Iterator[Difference]:
    """KV splits, as far as they are handed over.

    Which maximum a split's weights are divided by is free, as long as its sum and values go with
    it: so mean values are compared, and the logarithm of the sum.
    """
    there = np.asarray(splits_there(plan, layer, lengths))
    there = there & (there.sum(axis=1, keepdims=True) > 1) & room[:, None]
    compared = np.broadcast_to(there[:, None], want.shape[:3])
    got, wanted = (_as_means(plan, x) for x in (found.values, want))
    allowed = COMPUTED * np.broadcast_to(rms(wanted[..., :-1]), wanted.shape).copy()
    allowed[..., -1] = _LOGARITHM
    items = np.broadcast_to(found.there.all(axis=-1, keepdims=True), wanted.shape)
    yield from _if(
        find(
            plan, int(layer), "attention", "parts", got, wanted, allowed,
            there=items, compared=compared,
        )
    )  # fmt: skip


def _as_means(plan: StreamPlan, parts: np.ndarray) -> np.ndarray:
    """`[.., H + 1]`: the H means and the sum's logarithm in base 2; 0 and -1e30 of nothing."""
    size, parts = plan.dims.head_dim, parts.astype(np.float64)
    out, total, top = np.split(parts, [size, size + 1], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(total == 0, 0, out / total)
        logarithm = np.where(total == 0, -1e30, top + np.log2(total))
    return np.concatenate([means, logarithm], axis=-1)


def _compare_residual(
    plan: StreamPlan,
    layer: int,
    got: Array,
    want: dict[str, np.ndarray],
    more: np.ndarray | float,
    room: np.ndarray,
) -> Iterator[Difference]:
    """The residual behind the layer, in the owners' float32."""
    wanted = want["residual_out"]
    allowed = STEP_OF_FLOAT32 * np.abs(wanted) + more
    found = find(plan, layer, "down", "residual_out", got, wanted, allowed, compared=room)
    if found is None:
        return
    column = found.sequence * plan.dims.tokens + found.token
    hidden = step_of_residual(plan) * abs(want["x_mid"][(column, *found.place)])
    if abs(found.got - found.want) < hidden:
        note = (
            f"x_mid holds steps of {hidden:.2g} here, so it may as well be what attn_out has added."
        )
        found = find(
            plan, layer, "down", "residual_out", got, wanted, allowed, compared=room, note=note
        )
        assert found is not None
    yield found
