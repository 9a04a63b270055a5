"""Quantizes a model for the inputs that its matrices get when it reads a text, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ffjax.config import ModelConfig
from ffjax.formats import WeightFormat
from ffjax.gptq import Order, factor, round_calibrated, shifted
from ffjax.layer_inputs import embed, head_sums, layer_sums, run_layer
from ffjax.model import LayerAt, Transformer
from ffjax.tokenizer import check_known

__all__ = ["DAMPENING", "Calibration", "calibrated_arrays"]

DAMPENING = 0.01
"""GPTQ's own."""

# Of what dampening is raised to where float32 has no decomposition; beyond the last there is none.
_TENFOLD = 10
_LEAST_RAISED = 1e-3
_MOST = 10.0

_IN_TURN = ("qkv", "attn_out", "gate_up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What `ffjax.quantize` rounds weights for, and how: GPTQ (arXiv 2210.17323).

    Attributes:
        tokens: int `[n, T]`: n sequences of T tokens of the model, positions 0 to T - 1, as
            `ffjax.calibration_tokens` cuts them from texts. Padding has no place there.
        batch: sequences that are on the device at a time. It changes the memory and the time, and
            results by float32's rounding.
        dampening: this part of the mean of its diagonal is added to the diagonal of the sums of
            products of a matrix's inputs. Where float32 cannot decompose them, it is raised
            tenfold, up to 10.
        order: in which order a matrix's inputs are rounded. "largest": those first whose squares
            sum up to most ("act-order"), with scales chosen beforehand ("static groups"); integers
            are stored where they belong. "stored": one after the other, each group with the scale
            that is best when its turn comes.
        catch_up: whether weights are also moved, before they are rounded, to make up for what the
            layers before are off by (GPTAQ, arXiv 2504.02692). The unrounded model is run beside
            the other then, which doubles the time.
    """

    tokens: Any
    batch: int = 4
    dampening: float = DAMPENING
    order: Order = "largest"
    catch_up: bool = True

    def __post_init__(self):
        try:
            tokens = np.asarray(self.tokens)
        except ValueError:  # rows of several lengths
            tokens = np.empty(0)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(
                "Calibration takes sequences of one length, tokens [n, T] of at least one each; "
                f"got shape {tokens.shape}. ffjax.calibration_tokens cuts them from texts."
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"Tokens are integers, got {tokens.dtype}.")
        if tokens.min() < 0 or tokens.max() >= 2**31:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(f"Tokens are numbers of a vocabulary, from 0 on; got {wrong}.")
        object.__setattr__(self, "tokens", tokens.astype(np.int32))
        if type(self.batch) is not int or self.batch < 1:
            raise ValueError(f"A batch holds at least one sequence, got batch={self.batch!r}.")
        number = isinstance(self.dampening, int | float) and not isinstance(self.dampening, bool)
        if not number or not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening is a number from 0 to 1, got {self.dampening!r}.")
        if self.order not in get_args(Order):
            names = " or ".join(map(repr, get_args(Order)))
            raise ValueError(f"Inputs are rounded in the order {names}, got {self.order!r}.")

    def to_dict(self) -> dict[str, Any]:
        """How weights were rounded, as plain data: what a checkpoint keeps of it."""
        sequences, length = self.tokens.shape
        return {
            "method": "GPTQ" + ", catching up" * self.catch_up,
            "sequences": sequences,
            "length": length,
            "dampening": self.dampening,
            "order": self.order,
        }


def calibrated_arrays(
    model: Transformer,
    config: ModelConfig,
    calibration: Calibration,
    told: Callable[[int], None],
) -> dict[str, Array]:
    """The integers and scales of a model's matrices, by their dotted names.

    Args:
        model: the model before.
        config: the configuration of the one to be made.
        calibration: what to round for.
        told: is told the bytes of each matrix of a layer that is done.

    Raises:
        ValueError: a token is not the model's; there are more positions than it was made for; what
            a matrix takes is not finite.
    """
    tokens, formats = calibration.tokens, config.weights.quantized
    check_known("the calibration text", tokens.ravel(), config)
    if tokens.shape[1] > config.max_context:
        raise ValueError(
            f"Calibration sequences have {tokens.shape[1]} tokens; {config.name} was made for "
            f"{config.max_context} positions. Give shorter ones."
        )
    before = nnx.split(model)
    graph, state = before
    between = nnx.merge(graph, state)
    between.config = config  # so that it multiplies with whichever matrices are integers already
    after = nnx.split(between)
    streams = _Streams(model, calibration)
    made: dict[str, list[Array]] = {}
    stacked = model.stacked_weights()
    kinds = [None if kind is None else np.asarray(kind) for kind in model.layer_kinds()]
    for number in range(config.num_layers):
        local, other = (None if kind is None else kind[number] for kind in kinds)
        # A layer's cache is its own: to the programs, it is the first one.
        original = LayerAt(jnp.int32(0), local, _layer_of(stacked, np.int32(number)))
        here = original
        for name in (name for name in _IN_TURN if name in formats):
            weight = original.weights[name]
            sums = streams.sums(
                weight,
                functools.partial(layer_sums, *after, here, original, other, name=name),
            )
            what = f"{name} of layer {number} of {config.name}"
            integers, scale = _rounded(weight, sums, formats[name], calibration, what)
            here = here._replace(weights={**here.weights, name: integers, f"{name}_scale": scale})
            made.setdefault(f"layers.{name}", []).append(integers)
            made.setdefault(f"layers.{name}_scale", []).append(scale)
            told(weight.nbytes)
        streams.advance(functools.partial(run_layer, *after, here, other), 0)
        if calibration.catch_up:
            streams.advance(functools.partial(run_layer, *before, original, other), 1)
    arrays = _stacked(made)
    if "head" in formats:
        head = model.head_weight
        sums = streams.sums(head, functools.partial(head_sums, *before))
        what = f"the head of {config.name}"
        arrays["head"], arrays["head_scale"] = _rounded(
            head, sums, formats["head"], calibration, what
        )
        told(head.nbytes)
    return arrays


_Sums = tuple[Array, Array | None]


class _Streams:
    """What the next layer takes of every sequence, on the host: `[n, T, D]`, float32.

    There are two where weights catch up: that of the model so far, and that of the unrounded one.
    """

    def __init__(self, model: Transformer, calibration: Calibration):
        self._batch, tokens = calibration.batch, calibration.tokens
        self._streams = [np.empty((*tokens.shape, model.config.model_dim), np.float32)]
        for part in self._parts():
            self._streams[0][part] = embed(*nnx.split(model), tokens[part])
        if calibration.catch_up:
            self._streams.append(self._streams[0].copy())

    def _parts(self) -> Iterator[slice]:
        for first in range(0, len(self._streams[0]), self._batch):
            yield slice(first, first + self._batch)

    def sums(self, weight: Array, add: Callable[..., _Sums]) -> _Sums:
        """The sums, over all tokens, for a matrix `[out, in]`; see `layer_sums`."""
        size = weight.shape[-1]
        zeros = np.zeros((size, size), np.float32)
        sums: _Sums = jnp.asarray(zeros), jnp.asarray(zeros) if len(self._streams) > 1 else None
        for part in self._parts():
            inputs = [stream[part] for stream in self._streams]
            sums = add(inputs[0], inputs[1] if len(inputs) > 1 else None, sums)
        return sums

    def advance(self, layer: Callable[[np.ndarray], Array], which: int) -> None:
        """Takes a stream through a layer."""
        for part in self._parts():
            self._streams[which][part] = layer(self._streams[which][part])


def _rounded(
    weight: Array, sums: _Sums, format: WeightFormat, calibration: Calibration, what: str
) -> tuple[Array, Array]:
    dampening = calibration.dampening
    while dampening <= _MOST:
        how = {"format": format, "order": calibration.order}
        made, sound = _round(weight, *sums, jnp.float32(dampening), **how)
        if sound:
            return made
        if not all(np.isfinite(np.asarray(one)).all() for one in sums if one is not None):
            raise ValueError(
                f"Calibration sums up products of what matrices are given, and those of {what} are "
                "not finite numbers. See `ffjax doctor`; or leave out the calibration."
            )
        dampening = max(_TENFOLD * dampening, _LEAST_RAISED)
    raise ValueError(
        f"The inputs of {what} have sums of products that float32 cannot decompose, with a "
        f"dampening of up to {_MOST:g}. Leave out the calibration, or give another text."
    )


@functools.partial(jax.jit, static_argnames=("format", "order"))
def _round(
    weight: Array,
    hessian: Array,
    missed: Array | None,
    dampening: Array,
    *,
    format: WeightFormat,
    order: Order,
) -> tuple[tuple[Array, Array], Array]:
    """Integers and scales of a matrix, and whether they are any."""
    made = factor(hessian, dampening, order)
    weight = weight if missed is None else shifted(weight, missed, made)
    sound = made.sound if missed is None else made.sound & jnp.isfinite(missed).all()
    return round_calibrated(weight, made, format), sound


@jax.jit
def _layer_of(stacked: dict[str, Array], number: Array) -> dict[str, Array]:
    return jax.tree.map(lambda of: of[number], stacked)


@jax.jit
def _stacked(parts: dict[str, list[Array]]) -> dict[str, Array]:
    return {name: jnp.stack(of) for name, of in parts.items()}
