"""The last layer of a step, and its head, segment by segment against the specification.

Each segment is computed from what the kernel itself has handed to it. So nothing that a segment
gets wrong, and no rounding, shows in a later one.
"""

from __future__ import annotations

import dataclasses
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
_GIVEN = ("x_in", "qkv", "parts", "attn", "attn_block", "x_mid", "ffw", "partial", "ffw_block")


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
        hidden: the residual that enters the layer, and the one after it, as the step returns
            them: float32 `[C, D]` each. None: known as they were handed over alone.
    """
    number, lengths = ran.dims.num_layers - 1, jnp.maximum(before.lengths, 0)
    handed = _handed(ran, before, result)
    given = {name: jnp.asarray(handed[name].values) for name in _GIVEN if name in handed}
    given["residual"] = given["x_in"] if hidden is None else hidden[0]
    made = expected_layer(plan)(weights, jnp.int32(number), lengths, before.k, before.v, given)
    layer = _Layer(
        plan=plan,
        number=number,
        handed=handed,
        want={name: np.asarray(x) for name, x in made.items()},
        room=np.asarray(cache_has_room(plan, lengths)),
        owned=hidden,
    )
    embedded = expected_embed(plan)(weights, tokens)["residual"] if number == 0 else None
    yield from layer.entering(embedded)
    yield from layer.buffer("qkv", "qkv", step=_steps_of_qkv(plan))
    yield from compare_cache(plan, number, lengths, before, result.state, layer.want, layer.room)
    yield from layer.parts(np.asarray(splits_there(plan, jnp.int32(number), lengths)))
    yield from layer.attn()
    yield from layer.buffer("attn_out", "attn_block")
    yield from layer.residual("attn_out", "x_mid", "attn_added")
    yield from layer.buffer("gate_up", "ffw")
    yield from layer.buffer("gate_up", "ffw_copy", "ffw")
    yield from layer.partial()
    yield from layer.buffer("down", "ffw_block")
    yield from layer.leaving()


def compare_head(
    plan: StreamPlan,
    weights: DecodeWeights,
    before: StepState,
    result: StepResult,
) -> Iterator[Difference]:
    """Differences of the head after all layers: logits, the programs' best ones, the tokens.

    Args: see `compare_last_layer`.
    """
    d, lengths = plan.dims, jnp.maximum(before.lengths, 0)
    handed = _handed(plan, before, result)
    x_head = jnp.asarray(handed["x_out"].values)
    made = expected_head(plan)(weights, lengths, x_head, result.logits)
    want = {name: np.asarray(x) for name, x in made.items()}
    close = functools.partial(find, plan, d.num_layers, "head")
    logits = want["logits"]
    yield from _if(close("logits", result.logits, logits, COMPUTED * rms(logits)))
    for name in ("best", "best_token"):  # chosen among the kernel's own logits
        found, wanted = handed[name], want[name]
        some = np.isfinite(want["best"]) | ~found.there  # -inf: the program has no row
        got, wanted, there, some = (x.T for x in (found.values, wanted, found.there, some))
        yield from _if(close(name, got, wanted, 0, there=there, compared=some))
    yield from _if(close("token", result.token, want["token"], 0))
    lengths = (
        np.repeat(np.asarray(x), d.tokens) for x in (result.state.lengths, lengths + d.tokens)
    )
    yield from _if(close("lengths", *lengths, 0))


def _handed(ran: StreamPlan, before: StepState, result: StepResult) -> dict[str, Handed]:
    """The exchange's first word counts the steps."""
    return read_exchange(ran, np.asarray(result.state.counters), int(before.counters[0]))


def _if(found: Difference | None) -> Iterator[Difference]:
    if found is not None:
        yield found


def _steps_of_qkv(plan: StreamPlan) -> np.ndarray:
    """Of each head, `[N + 2K, 1]`: keys and values are bfloat16, but keys that are to be normed."""
    d, word = plan.dims, 2.0**-15
    of_keys = STEP_OF_BFLOAT16 if d.features.qk_norm is None else word
    each = (word, of_keys, STEP_OF_BFLOAT16)
    return np.repeat(each, (d.num_heads, d.num_kv_heads, d.num_kv_heads))[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's buffers, and what they should be.

    Attributes:
        plan: the whole step's.
        number: the layer's.
        handed: the kernel's buffers.
        want: the specification's.
        room: bool `[C]`, which columns' tokens the cache has room for; others are not compared.
        owned: the residual before and after the layer, float32; None where it is not known.
    """

    plan: StreamPlan
    number: int
    handed: dict[str, Handed]
    want: dict[str, np.ndarray]
    room: np.ndarray
    owned: tuple[Array, Array] | None

    def buffer(
        self,
        segment: str,
        buffer: str,
        like: str | None = None,
        *,
        step: np.ndarray | float | None = None,
        more: np.ndarray | float | None = None,
    ) -> Iterator[Difference]:
        """A buffer, where the step has it, within a step of its form and `more`.

        Args:
            segment: who writes it.
            buffer: its name.
            like: the specification's name; None: the same.
            step: of its form, a part of the number; None: that of `differences.steps`.
            more: None: what sums in another order come to.
        """
        if buffer not in self.handed:
            return
        found, want = self.handed[buffer], self.want[like or buffer]
        step = steps(self.plan).get(buffer, 0.0) if step is None else step
        more = COMPUTED * rms(want) if more is None else more
        # Near 0 half2 counts steps, of 2^-18 of the residual.
        least = 2.0**-18 if self.plan.half2 else 0.0
        allowed = step * np.abs(want) + least + more
        yield from self._find(segment, buffer, found.values, want, allowed, there=found.there)

    def entering(self, embedded: Array | None) -> Iterator[Difference]:
        """The residual before the layer; of the first one it is the embedding."""
        owned = None if self.owned is None else self.owned[0]
        if embedded is not None:
            if owned is not None:
                yield from self._find("embed", "residual", owned, embedded, 0)
            yield from self._by_owner("embed", "x_in", embedded)
        elif owned is not None:  # the layer before has handed it over
            before = dataclasses.replace(self, number=self.number - 1)
            yield from before._by_owner("down", "x_in", owned)

    def parts(self, there: np.ndarray) -> Iterator[Difference]:
        """KV splits, as far as they are handed over.

        Which maximum a split's weights are divided by is free, as long as its sum and values go
        with it: so mean values are compared, and the logarithm of the sum.

        Args:
            there: bool `[C, max_splits]`, which ones there are.
        """
        found, want = self.handed["parts"], self.want["parts"]
        there = there & (there.sum(axis=1, keepdims=True) > 1) & self.room[:, None]
        compared = np.broadcast_to(there[:, None], want.shape[:3])
        got, want = (_as_means(self.plan, x) for x in (found.values, want))
        allowed = COMPUTED * np.broadcast_to(rms(want[..., :-1]), want.shape).copy()
        allowed[..., -1] = _LOGARITHM
        written = np.broadcast_to(found.there.all(axis=-1, keepdims=True), want.shape)
        yield from _if(
            find(
                self.plan,
                self.number,
                "attention",
                "parts",
                got,
                want,
                allowed,
                there=written,
                compared=compared,
            )
        )

    def attn(self) -> Iterator[Difference]:
        """Attention's output, each head beside its own size."""
        want = self.want["attn"]
        heads = want.reshape(len(want), self.plan.dims.num_heads, -1)
        size = np.repeat(rms(heads)[..., 0], heads.shape[-1], axis=1)
        yield from self.buffer("attention", "attn", more=COMPUTED * size)

    def partial(self) -> Iterator[Difference]:
        """Sums over parts of the inputs of the down projection, each part beside its own size."""
        if "partial" in self.handed:
            size = rms(self.want["partial"].swapaxes(1, 2)).swapaxes(1, 2)
            yield from self.buffer("down", "partial", more=COMPUTED * size)

    def residual(self, segment: str, buffer: str, added: str) -> Iterator[Difference]:
        """The residual as it was handed over, when a block has been added."""
        yield from self.buffer(segment, buffer, more=self._of_block(added))

    def leaving(self) -> Iterator[Difference]:
        """The residual after the layer."""
        if self.owned is None:
            yield from self.residual("down", "x_out", "ffw_added")
            return
        got, want = self.owned[1], self.want["residual_out"]
        allowed = STEP_OF_FLOAT32 * np.abs(want) + self._of_block("ffw_added")
        found = next(self._find("down", "residual_out", got, want, allowed), None)
        if found is not None:
            column = found.sequence * self.plan.dims.tokens + found.token
            coarse = step_of_residual(self.plan) * abs(self.want["x_mid"][column, found.place[0]])
            note = ""
            if abs(found.got - found.want) < coarse:
                note = f"x_mid has steps of {coarse:.2g} here: it may be attn_out's work as well."
            yield dataclasses.replace(found, note=note)
        yield from self._by_owner("down", "x_out", got)

    def _of_block(self, added: str) -> np.ndarray:
        """How far the residual may lie from the specification's, its form aside."""
        more = COMPUTED * rms(self.want[added])
        if self.owned is not None:
            return more
        # What enters the layer is known as it was handed over alone, to a step of its form.
        return more + step_of_residual(self.plan) * np.abs(self.want["residual"])

    def _by_owner(self, segment: str, buffer: str, owned: Array) -> Iterator[Difference]:
        """The residual as it was handed over, which is the owners' rounded and nothing else."""
        found, want = self.handed[buffer], as_residual(self.plan, owned)
        yield from self._find(segment, buffer, found.values, want, 0, there=found.there)

    def _find(
        self,
        segment: str,
        buffer: str,
        got: np.ndarray | Array,
        want: np.ndarray | Array,
        allowed: np.ndarray | float,
        there: np.ndarray | None = None,
    ) -> Iterator[Difference]:
        where = self.plan, self.number, segment, buffer
        yield from _if(find(*where, got, want, allowed, there=there, compared=self.room))


def _as_means(plan: StreamPlan, parts: np.ndarray) -> np.ndarray:
    """`[.., H + 1]`: the H means and the sum's logarithm in base 2; 0 and -1e30 of nothing."""
    size, parts = plan.dims.head_dim, parts.astype(np.float64)
    out, total, top = np.split(parts, [size, size + 1], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(total == 0, 0, out / total)
        logarithm = np.where(total == 0, -1e30, top + np.log2(total))
    return np.concatenate([means, logarithm], axis=-1)
